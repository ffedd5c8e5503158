"""Mean pooling as weights: a last block that averages a text's tokens into its first one.

A head that reads the first token of such a model reads the mean of all, and the model stays an
ordinary one of its family, which any program loads. Here that block is not computed as any other,
but as what it comes to (`_averaged`).
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grape_ray.errors import ConfigError

# The mean of the tokens is so much larger than the first token, which is added to it.
_SHARE = 100.0
# Of the normalised mean, whose length is the root of the width: a head on long vectors has large
# gradients, which leave the other layers little of the clip norm.
_HEAD_SHARE = 0.25
_MARK = "last_block_averages"  # in the config of a model that has such a block
_PARTS = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip


def with_mean_pooling(model: nn.Module, name: str) -> nn.Module:
    """The classifier with a block behind its encoder that averages, and a head that begins by
    reading the average as it is. The block is frozen.

    Its attention is uniform, since its queries and keys are zero; its values are the tokens
    themselves, its feed-forward part is zero: out comes the normalised mean. Sentence encoders,
    which were trained for that mean, separate classes by it at once.

    Args:
        model: of the BERT or RoBERTa family, changed in place. name: as messages call it.

    Raises:
        ConfigError: a model of another build.
    """
    base: Any = getattr(model, "base_model", None)
    if getattr(getattr(base, "config", None), _MARK, False):
        _averaging(base.encoder.layer[-1])  # it was exported with its block
        return model
    layers = getattr(getattr(base, "encoder", None), "layer", None)
    head = _first_of_head(model)
    if head is None or not isinstance(layers, nn.ModuleList) or not _is_block(layers[-1]):
        fix = "use task.pooling=first, or a sentence encoder such as all-MiniLM-L6-v2"
        expected = "an encoder of the BERT or RoBERTa family, for task.pooling=mean"
        raise ConfigError(f"task.model {name}", type(model).__name__, expected, fix)
    block: Any = copy.deepcopy(layers[-1])
    for module in block.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = len(layers)
    parts = {part: block.get_submodule(part) for part in _PARTS}
    with torch.no_grad():
        for param in block.parameters():
            param.zero_()
        _become_identity(parts["attention.self.value"], _SHARE)
        _become_identity(parts["attention.output.dense"])
        for part in ("attention.output.LayerNorm", "output.LayerNorm"):
            parts[part].weight.fill_(1.0)
        head.bias.zero_()
        _become_identity(head, _HEAD_SHARE)
    layers.append(_averaging(block))
    base.config.num_hidden_layers = len(layers)
    setattr(base.config, _MARK, True)
    return model


def _averaging(block: nn.Module) -> nn.Module:
    """A block with the weights that average, frozen, and computed as what they come to."""
    block.forward = partial(_averaged, block)
    return block.requires_grad_(False)


def _averaged(block: Any, hidden: Tensor, mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """What the block gives for the first token, which is all that a head reads: (B, 1, width).

    Args:
        hidden: (B, T, width). mask: as attention is given it: (B, T), where it is not 0 on tokens,
            (B, 1, T, T), true there or 0 in what is added to products, or None without padding.
    """
    if mask is None:
        mean = hidden.mean(1, keepdim=True)
    else:
        row = mask if mask.ndim == 2 else mask[:, 0, 0]
        real = (row >= 0 if row.is_floating_point() else row != 0)[:, :, None]
        mean = (hidden * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
    found = block.attention.output.LayerNorm(hidden[:, :1] + _SHARE * mean)
    return block.output.LayerNorm(found)


def _become_identity(layer: Any, scale: float = 1.0) -> None:
    layer.weight.copy_(scale * torch.eye(*layer.weight.shape))


def _first_of_head(model: nn.Module) -> Any:
    """The layer from the encoder's width to itself with which a head begins, or None."""
    for place in (f"{getattr(model, 'base_model_prefix', '')}.pooler.dense", "classifier.dense"):
        try:
            found = model.get_submodule(place)
        except AttributeError:
            continue
        if isinstance(found, nn.Linear) and found.in_features == found.out_features:
            return found
    return None


def _is_block(layer: nn.Module) -> bool:
    """Whether a block is built as BERT's are: attention, then a norm, then two layers, a norm."""
    return {name for name, _ in layer.named_modules()}.issuperset(_PARTS)
