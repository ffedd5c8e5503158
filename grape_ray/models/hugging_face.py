"""Hugging Face models and tokenizers by hub name or folder, with errors that say what is
missing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import nn

from grape_ray.errors import ConfigError
from grape_ray.models import four_bit
from grape_ray.models.from_scratch import byte_tokenizer, is_scratch, scratch_config
from grape_ray.storage import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
# parts below the base model that a checkpoint of it may lack, because a classifier's own head holds
# them
_HEADS = ("pooler", "summary")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS = (*_DTYPES, "nf4")  # types of weights in memory; nf4: see `models.four_bit`
_SOURCE = "a hub name, a folder with config.json and weights, or scratch:FAMILY"


def load_tokenizer(name: str, field: str = "task.model", **options: Any) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a hub name or folder.

    Where a folder has none, transformers makes one up for some families, with special tokens alone:
    that is refused, too.

    Args:
        field: what the configuration calls it. options: of the tokenizer.

    Raises:
        ConfigError: there is none.
    """

    def build(place: str) -> PreTrainedTokenizerBase:
        if is_scratch(name):
            return byte_tokenizer()
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            place, use_fast=True, trust_remote_code=False, **options
        )
        if not _has_its_files(place, type(tokenizer).vocab_files_names):
            fix = f"save it there: AutoTokenizer.from_pretrained(ORIGIN).save_pretrained({name!r})"
            raise ConfigError(
                f"{field} has no tokenizer",
                name,
                "the files of one, such as tokenizer.json, beside the weights",
                fix,
            )
        return tokenizer

    return load_with(name, build, field)


def _has_its_files(place: str, names: dict[str, str]) -> bool:
    """Whether the vocabulary that a kind of tokenizer reads is there: one file for all, or all of
    its own. Bytes need none.
    """

    def there(file: str) -> bool:
        if os.path.isdir(place):
            return Path(place, file).is_file()
        missing_ok = {
            f"_raise_exceptions_for_{kind}": False
            for kind in ("gated_repo", "missing_entries", "connection_errors")
        }
        return transformers.utils.cached_file(place, file, **missing_ok) is not None

    own = [
        file
        for kind, file in names.items()
        if kind in ("vocab_file", "merges_file", "spm_file", "source_spm")
    ]
    return not names or there("tokenizer.json") or (bool(own) and all(map(there, own)))


def load_classifier(
    name: str,
    classes: int,
    seed: int,
    dropout: bool = False,
    of: str = "SequenceClassification",
    weights: str = "fp32",
) -> nn.Module:
    """A model with a fresh classification head, or with the one that the weights hold for as many
    classes.

    Args:
        name: hub name, or a folder with config.json and weights. classes: number of labels; 1 is a
            head for a number.
        seed: public seed of the new head. dropout: whether the model stays in training mode;
            otherwise its dropout is off.
        of: what is classified, as transformers ends the names of its classes: also
            `TokenClassification` and `ImageClassification`. weights: one of `WEIGHTS`.

    Raises:
        ConfigError: no such model, it cannot classify these, its weights are not whole, or its
            head is for other classes.
    """
    kind = getattr(transformers, f"AutoModelFor{of}")

    def build(place: str) -> nn.Module:
        model, found = _weights(kind, place, seed, weights, num_labels=classes)
        prefix = f"{model.base_model_prefix}."
        inner = [
            key
            for key in found["missing_keys"]
            if key.startswith(prefix) and not any(head in key for head in _HEADS)
        ]
        for key, theirs, mine in sorted(found["mismatched_keys"]):
            if not key.startswith(prefix) and theirs[:1] != mine[:1] == (classes,):
                fix = "save the model without its head"
                fix = f"set task.classes={theirs[0]}, or {fix}" if classes > 1 else fix
                raise ConfigError(
                    f"the head of task.model {name}",
                    f"{theirs[0]} labels",
                    f"task.classes = {classes}" if classes > 1 else "one number",
                    fix,
                )
        return _whole(name, model, {**found, "missing_keys": inner})

    return load_with(name, build).train(dropout)


def load_language_model(
    name: str, seed: int, kind: str = "CausalLM", weights: str = "fp32"
) -> nn.Module:
    """A model with its pretrained language-modelling head, dropout off.

    Args:
        name: hub name, or a folder with config.json and weights. seed: public seed of what is drawn
            while the model is built. kind: as transformers ends the names of its classes: also
            `MaskedLM` and `Seq2SeqLM`. weights: one of `WEIGHTS`.

    Raises:
        ConfigError: no such model, it has no such head, or its weights are not whole.
    """
    auto = getattr(transformers, f"AutoModelFor{kind}")
    return load_with(name, lambda place: _whole(name, *_weights(auto, place, seed, weights))).eval()


def load_config(name: str) -> Any:
    """The configuration of a model. Raises ConfigError: none there."""

    def build(place: str) -> Any:
        if is_scratch(name):
            return scratch_config(name)
        return transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)

    return load_with(name, build)


def load_as_saved(name: str) -> nn.Module:
    """A model in the architecture that its config names, fp32, in eval mode.

    Raises:
        ConfigError: it cannot be loaded, or its weights are not whole.
    """

    def build(place: str) -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
        kind = getattr(
            transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel
        )
        return _whole(name, *_weights(kind, place, 0, "fp32"))

    return load_with(name, build).eval()


def check_vocabulary(model: nn.Module, tokens: int, name: str) -> nn.Module:
    """The model, if its embedding has a row for each of so many tokens. Raises ConfigError."""
    rows = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
    if tokens > rows:
        fix = (
            "save the model after model.resize_token_embeddings(len(tokenizer)), or use the"
            " tokenizer that it was trained with"
        )
        raise ConfigError(
            f"the embedding of task.model {name}",
            f"{rows} rows",
            f"one for each of its tokenizer's {tokens} tokens",
            fix,
        )
    return model


def tokens_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids a tokenizer may give, from 0 on."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


@contextlib.contextmanager
def explaining_long_texts(model: nn.Module, length: int) -> Iterator[None]:
    """Where a pass over texts of so many tokens fails, and the model has fewer positions, the error
    says so. Raises ConfigError.
    """
    try:
        yield
    except (IndexError, RuntimeError, ValueError):
        positions = positions_of(model)
        if positions is None or length <= positions:
            raise
    else:
        return
    fix = f"set task.max_tokens={positions}, which cuts longer ones"
    raise ConfigError(
        "a text is too long for task.model",
        f"{length} tokens",
        f"at most its {positions} positions",
        fix,
    )


def positions_of(model: nn.Module) -> int | None:
    """The longest text that a model with a table of positions reads; None for one without."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and any(
            part in name.rpartition(".")[2] for part in ("position", "wpe")
        ):
            # Of two families the first rows of the table are not for positions: up to that of
            # padding, and OPT's offset.
            unused = (
                module.padding_idx + 1
                if module.padding_idx is not None
                else getattr(module, "offset", 0)
            )
            return module.num_embeddings - unused
    return None


def save_pretrained(model: nn.Module, folder: Path) -> None:
    """Writes a Hugging Face model's folder, without progress bars."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]


def _weights(kind: Any, place: str, seed: int, weights: str, **options: Any) -> tuple[Any, Json]:
    """A model in one of `WEIGHTS`, and what of them was not there or had another shape."""
    shapes_alone = torch.get_default_device().type == "meta"
    made = _drawn if is_scratch(place) or shapes_alone else _loaded
    return made(kind, place, seed, weights, **options)


def _loaded(kind: Any, place: str, seed: int, weights: str, **options: Any) -> tuple[Any, Json]:
    """A model from its files, which are read into its own type of weights at once."""
    if weights == "nf4":
        options |= four_bit.loading_options("num_labels" in options)
    else:
        options["dtype"] = _DTYPES[weights]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        # What does not fit we refuse by name; transformers would print a table on the terminal.
        options |= {
            "ignore_mismatched_sizes": True,
            "output_loading_info": True,
            "trust_remote_code": False,
        }
        model, found = kind.from_pretrained(place, **options)
    if weights == "nf4":
        four_bit.settle(model)
    return model, found


def _drawn(kind: Any, name: str, seed: int, weights: str, **options: Any) -> tuple[Any, Json]:
    """A model that begins at random weights, of which none is missing; on the meta device one of
    any weights.
    """
    if weights == "nf4":
        fix = "set task.weights=fp32, or name pretrained weights"
        raise ConfigError("task.weights", weights, "fp32 or bf16 of random weights", fix)
    config = load_config(name)
    for field, value in options.items():
        setattr(config, field, value)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = kind.from_config(config, trust_remote_code=False, dtype=_DTYPES[weights])
    return model, {"mismatched_keys": [], "missing_keys": []}


def _whole(name: str, model: nn.Module, found: Json) -> nn.Module:
    """The model, if all its weights came from its files; else ConfigError: drawn weights would pass
    for pretrained.
    """
    expected = "weights of the architecture that its config.json names"
    fix = "save it whole again, or correct its config.json"
    for key, theirs, mine in sorted(found["mismatched_keys"]):
        raise ConfigError(
            f"the weights of task.model {name} do not fit",
            f"{key} {tuple(theirs)}",
            f"{tuple(mine)}",
            fix,
        )
    missing = sorted(found["missing_keys"])
    if missing or found.get("error_msgs"):
        got = (
            f"{missing[0]} missing, one of {len(missing)}"
            if missing
            else "weights that could not be read"
        )
        raise ConfigError(f"the weights of task.model {name} are not whole", got, expected, fix)
    for key, tensor in model.named_parameters():
        if tensor.is_meta:
            break
        # a sum needs no memory of the tensor's size
        if not bool(torch.isfinite(tensor.detach().sum())):
            raise ConfigError(
                f"the weights of task.model {name} are damaged",
                f"{key} is not finite",
                "numbers",
                "download or save it again",
            )
    return model


def load_with(name: str, build: Callable[[str], _T], field: str = "task.model") -> _T:
    """`build` on the hub name or expanded folder. Raises ConfigError for all that can be wrong."""
    place = os.path.expanduser(name)
    looks_local = (
        not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(place).exists()
    )
    if looks_local and not Path(place, "config.json").is_file() and field == "task.model":
        raise ConfigError(field, name, _SOURCE, "check the path")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return build(place)
    except ConfigError:
        raise
    # Of any library that reads a part of it: a torn file has as many kinds as there are formats.
    except Exception as error:
        reason = f"{type(error).__name__}: " + (str(error).splitlines() or [""])[0][:200]
        raise ConfigError(f"{field} cannot be loaded", name, _SOURCE, reason) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
