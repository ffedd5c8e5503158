"""The models of the benchmarks: Hugging Face architectures with random weights, a batch and a loss
each.

Nothing is downloaded and no dropout is on; attention is the library's default (SDPA). Text batches
carry no padding, so no mask is passed. The vocabulary is 1,000 words unless asked for otherwise,
small enough that peers which make a (B, V, width) gradient of the table run beside the others: at a
real one (50,265) and width 768 that is 154 MB an example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grape_ray.errors import ConfigError, nearest
from grape_ray.tasks.task import under_autocast

_FIRST_WORD = 5  # ids below are special to some family: padding, begin, end
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Setting:
    """What is measured, whatever the method.

    Attributes:
        model: a row of MODELS. rows: examples B in a batch. tokens: positions T of a text; images
            have their own.
        vocabulary: rows of the embedding table. device: `cpu` or `cuda`. bf16: the loss runs under
            bf16 autocast.
        threads: torch threads; 0 leaves torch's own choice.
    """

    model: str
    rows: int
    tokens: int
    vocabulary: int = 1000
    device: str = "cpu"
    bf16: bool = False
    threads: int = 0

    @property
    def title(self) -> str:
        """The model and the shape, for headings."""
        text = "" if MODELS[self.model].images else f", V={self.vocabulary}"
        return (
            f"{self.model} (B={self.rows}, T={self.tokens}{text},"
            f" {'bf16 autocast' if self.bf16 else 'float32'}, {self.device})"
        )


@dataclass(frozen=True)
class BenchModel:
    """An architecture.

    Attributes:
        build: (T, vocabulary) -> model. loss: (model, batch) -> (B,). rows, tokens: B and T unless
            asked for otherwise.
        images: whether the batch is of images, whose T is fixed. about: one line.
    """

    build: Callable[[int, int], nn.Module]
    loss: Loss
    rows: int
    tokens: int
    about: str
    images: bool = False


def class_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy (B,) of a classifier."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy (B,) of each text's next tokens."""
    ids = batch["input_ids"]
    logits = model(input_ids=ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


def _make(model: str, config: str, **fields: Any) -> nn.Module:
    """A Hugging Face model in eval mode, from the names of its class and its config."""
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()


def _bert_like(width: int, layers: int, heads: int) -> Callable[[int, int], nn.Module]:
    def build(tokens: int, vocabulary: int) -> nn.Module:
        return _make(
            "RobertaForSequenceClassification", "RobertaConfig", vocab_size=vocabulary,
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * width, max_position_embeddings=tokens + 2, pad_token_id=1,
            type_vocab_size=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip

    return build


def _opt(width: int, layers: int, heads: int) -> Callable[[int, int], nn.Module]:
    def build(tokens: int, vocabulary: int) -> nn.Module:
        return _make(
            "OPTForSequenceClassification", "OPTConfig", vocab_size=vocabulary, hidden_size=width,
            num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=4 * width,
            max_position_embeddings=tokens, word_embed_proj_dim=width, dropout=0.0,
            attention_dropout=0.0, layerdrop=0.0, pad_token_id=1, bos_token_id=2, eos_token_id=2,
        )  # fmt: skip

    return build


def _neox(tokens: int, vocabulary: int) -> nn.Module:
    return _make(
        "GPTNeoXForSequenceClassification", "GPTNeoXConfig", vocab_size=vocabulary, hidden_size=768,
        num_hidden_layers=6, num_attention_heads=12, intermediate_size=3072,
        max_position_embeddings=tokens, hidden_dropout=0.0, attention_dropout=0.0,
        classifier_dropout=0.0, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip


def _vit(tokens: int, vocabulary: int) -> nn.Module:
    return _make(
        "ViTForImageClassification", "ViTConfig", hidden_size=192, num_hidden_layers=12,
        num_attention_heads=3, intermediate_size=768, image_size=224, patch_size=16, num_labels=10,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def _llama(tokens: int, vocabulary: int) -> nn.Module:
    return _make(
        "LlamaForCausalLM", "LlamaConfig", vocab_size=vocabulary, hidden_size=512,
        num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1376,
        max_position_embeddings=tokens, tie_word_embeddings=False, use_cache=False, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


MODELS: dict[str, BenchModel] = {
    "encoder": BenchModel(
        _bert_like(768, 6, 12), class_loss, 16, 128, "RoBERTa-like classifier, 6 layers x 768"
    ),
    "decoder": BenchModel(
        _opt(768, 6, 12), class_loss, 16, 128, "OPT-like classifier, 6 layers x 768"
    ),
    "decoder-neox": BenchModel(
        _neox,
        class_loss,
        16,
        128,
        "GPT-NeoX-like classifier, 6 layers x 768: a decoder that Opacus can train",
    ),
    "vit": BenchModel(
        _vit,
        class_loss,
        32,
        197,
        "ViT, 12 layers x 192, 224 x 224 pixels in patches of 16",
        images=True,
    ),
    "llama": BenchModel(
        _llama,
        next_token_loss,
        2,
        256,
        "Llama-like, 2 layers x 512, gated MLP, grouped queries, untied head",
    ),
    "encoder-large": BenchModel(
        _bert_like(1024, 24, 16), class_loss, 16, 128, "RoBERTa-Large-like classifier"
    ),
    "decoder-1.3b": BenchModel(_opt(2048, 24, 32), class_loss, 8, 128, "OPT-1.3B-like classifier"),
    "tiny": BenchModel(
        _bert_like(96, 1, 2),
        class_loss,
        4,
        8,
        "RoBERTa-like classifier, 1 layer x 96, for tests and warm-up",
    ),
}


def setting(
    model: str,
    rows: int | None = None,
    tokens: int | None = None,
    vocabulary: int = 1000,
    **rest: Any,
) -> Setting:
    """The setting of a model, its own shape where none is given.

    Raises:
        ConfigError: an unknown model, a shape below 1, another T for images, or no room for words
            in the vocabulary.
    """
    if model not in MODELS:
        raise ConfigError(
            "model of the benchmark", model, "one of " + ", ".join(MODELS), nearest(model, MODELS)
        )
    known = MODELS[model]
    made = Setting(model, rows or known.rows, tokens or known.tokens, vocabulary, **rest)
    if made.rows < 1 or made.tokens < 2:
        raise ConfigError(
            "shape of the benchmark", f"B={made.rows}, T={made.tokens}", "B >= 1 and T >= 2"
        )
    if known.images and made.tokens != known.tokens:
        raise ConfigError(
            f"tokens of {model}",
            made.tokens,
            f"{known.tokens}, which its images have",
            "leave out --tokens",
        )
    if vocabulary < 128:
        raise ConfigError("vocabulary", vocabulary, "an integer >= 128")
    return made


def build(where: Setting) -> tuple[nn.Module, Loss, dict[str, Tensor]]:
    """The model, its per-example loss and one fixed batch, on the device; a function of the setting
    alone.
    """
    known = MODELS[where.model]
    torch.manual_seed(0)
    model = known.build(where.tokens, where.vocabulary).to(where.device)
    generator = torch.Generator().manual_seed(1)
    batch = {"labels": torch.randint(0, 2, (where.rows,), generator=generator)}
    if known.images:
        batch["pixel_values"] = torch.randn(where.rows, 3, 224, 224, generator=generator)
    else:
        batch["input_ids"] = torch.randint(
            _FIRST_WORD, where.vocabulary, (where.rows, where.tokens), generator=generator
        )
    batch = {name: tensor.to(where.device) for name, tensor in batch.items()}
    return model, under_autocast(known.loss, where.device) if where.bf16 else known.loss, batch
