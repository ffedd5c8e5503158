"""What of a model is trained: adapters beside frozen weights (LoRA), or those weights that patterns
name.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grape_ray.distributed.sharding import stacks
from grape_ray.errors import ConfigError, nearest
from grape_ray.models.extras import needed
from grape_ray.models.four_bit import CLASSIFIERS

UPPER_HALF = "upper-half"  # in place of a pattern
_PREFIX = "base_model.model."  # before each name, once a model has adapters


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, "LoRA"), through the library peft.

    Attributes:
        rank: of each adapter; 0 has none. alpha: an adapter's output is multiplied by alpha / rank.
        targets: names of the layers that get one, as peft matches them (the last parts of a name);
            none is all linear layers but the head.
        dropout: of an adapter's input; it turns the training mode on, with the model's own dropout.
        merge: whether an export holds one model, the adapters added to its weights, or the adapters
            alone, to be loaded by peft beside the model that they were trained on.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    merge: bool = True

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("rank", self.rank >= 0, "an integer >= 0"),
            ("alpha", 0 < self.alpha < float("inf"), "a number > 0"),
            ("dropout", 0 <= self.dropout < 1, "a number in [0, 1)"),
        ):
            if not ok:
                raise ConfigError(f"task.lora.{name}", getattr(self, name), expected)


def adapted(model: nn.Module, lora: Lora, trainable: Sequence[str], seed: int) -> nn.Module:
    """The model with what is to be trained, and nothing else, requiring gradients.

    With adapters a fresh head is trained, too, in full.

    Args:
        trainable: name patterns (fnmatch) of weights, or `UPPER_HALF`; with adapters in addition to
            them, and none without adapters trains all.
        seed: public seed of the adapters.

    Raises:
        ConfigError: no adapter can be made of the model, or a pattern names none of its weights.
    """
    names, chosen = [name for name, _ in model.named_parameters()], set[str]()
    for pattern in trainable:
        found = _upper_half(model) if pattern == UPPER_HALF else fnmatch.filter(names, pattern)
        if not found:
            fix = nearest(pattern, names)
            raise ConfigError("task.trainable", pattern, "a pattern of names of weights", fix)
        chosen.update(found)
    if lora.rank:
        model = _with_adapters(model, lora, seed)
    if trainable:
        for name, param in model.named_parameters():
            if _plain(name) in chosen:
                _check_trainable(name, param)
                param.requires_grad_(True)
            elif not lora.rank:
                param.requires_grad_(False)
    return model


def merged(model: nn.Module) -> nn.Module:
    """A model's adapters added to its weights, as a model without them; any other as it is."""
    merge: Any = getattr(model, "merge_and_unload", None)
    return merge(safe_merge=False) if merge else model


def save_adapters(model: nn.Module, folder: Path) -> None:
    """Writes the adapters and the head of a model, as peft loads them."""
    save: Any = model.save_pretrained
    save(folder)


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return hasattr(model, "peft_config")


def _with_adapters(model: nn.Module, lora: Lora, seed: int) -> nn.Module:
    peft = needed("peft", "task.lora", "lora")
    base: Any = model
    linear = [n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, nn.Linear)]
    for target in lora.targets:
        if not _matches(target, (name for name, _ in base.named_modules())):
            fix = nearest(target, set(linear))
            raise ConfigError("task.lora.targets", target, "the name of a layer", fix)
    options = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets) or "all-linear",
        lora_dropout=lora.dropout,
        task_type=_task_type(base),
        # of images peft does not know the head, and of tokens it would give it an adapter, too
        modules_to_save=["classifier"] if _classifies(base, "Image") else None,
        exclude_modules=list(CLASSIFIERS) if _classifies(base, "Image", "Token") else None,
    )
    training = base.training
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(base, options).train(training or lora.dropout > 0)
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                "task.lora", f"targets {list(lora.targets)}", "layers of the model", reason
            ) from error


def _upper_half(model: nn.Module) -> list[str]:
    """The names of the weights of the later half of a model's blocks (of an encoder's and of a
    decoder's); a block that is frozen from the beginning does not count.
    """
    upper: set[nn.Parameter] = set()
    for stack in stacks(model):
        blocks = [b for b in stack if any(p.requires_grad for p in b.parameters())]
        upper.update(p for block in blocks[len(blocks) // 2 :] for p in block.parameters())
    return [name for name, param in model.named_parameters() if param in upper]


def _check_trainable(name: str, param: nn.Parameter) -> None:
    if not param.is_floating_point():
        what, fix = (
            f"task.trainable names '{_plain(name)}'",
            "name others, or set task.weights=bf16",
        )
        raise ConfigError(what, "a weight in four bits", "floating-point weights", fix)


def _task_type(model: nn.Module) -> str | None:
    """What peft calls the model's kind, by which it knows its head; None for others."""
    ends = {
        "ForSequenceClassification": "SEQ_CLS", "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForTokenClassification": "TOKEN_CLS",
    }  # fmt: skip
    name = type(model).__name__
    return next((kind for end, kind in ends.items() if name.endswith(end)), None)


def _classifies(model: nn.Module, *what: str) -> bool:
    return type(model).__name__.endswith(tuple(f"For{kind}Classification" for kind in what))


def _matches(target: str, names: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _plain(name: str) -> str:
    """A weight's name as it was before the model had adapters."""
    name = name.removeprefix(_PREFIX)
    return name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
