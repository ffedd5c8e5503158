"""A plausible loss and batch for any Hugging Face model, so that a model can be checked without a
dataset.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grape_ray.engines.losses import PerExampleLoss
from grape_ray.errors import ConfigError
from grape_ray.models.hugging_face import load_as_saved


def sample(
    name: str, rows: int = 3, length: int = 12
) -> tuple[nn.Module, PerExampleLoss, dict[str, Tensor]]:
    """The model in its own architecture, a per-example loss and a batch of random inputs.

    Args:
        name: hub name or folder. rows: examples. length: tokens, where the model reads text.

    Raises:
        ConfigError: the model cannot be loaded, or takes neither tokens nor pixels.
    """
    model = load_as_saved(name)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return model, sample_loss, made_up_batch(model, rows, length)


def made_up_batch(model: nn.Module, rows: int, length: int) -> dict[str, Tensor]:
    """Random inputs of a model, by its configuration.

    Args:
        rows, length: as of `sample`.

    Raises:
        ConfigError: it takes neither tokens nor pixels.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "vocab_size", None):
        ids = torch.randint(5, config.vocab_size, (rows, length))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = ids.clone()
        return batch
    if getattr(config, "image_size", None):
        size = (
            config.image_size
            if isinstance(config.image_size, (tuple, list))
            else (config.image_size,) * 2
        )
        return {"pixel_values": torch.randn(rows, config.num_channels, *size)}
    expected = "a model of tokens or pixels"
    fix = "name another, or check a pipeline whose task makes its batches"
    raise ConfigError("model", type(model).__name__, expected, fix)


def sample_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy against the inputs for a language model, against class 0 for a classifier,
    squares for bare features.
    """
    cached = getattr(getattr(model, "config", None), "use_cache", None) is not None
    out = model(**batch, **({"use_cache": False} if cached else {}))
    logits = getattr(out, "logits", None)
    if logits is None:
        return out.last_hidden_state.square().flatten(1).mean(1)
    if logits.ndim == 2:
        return F.cross_entropy(
            logits, logits.new_zeros(len(logits), dtype=torch.long), reduction="none"
        )
    ids = batch.get("decoder_input_ids", batch["input_ids"])
    classes = logits.shape[-1]
    return F.cross_entropy(logits.transpose(1, 2), ids % classes, reduction="none").mean(1)
