"""The loss of a text: cross-entropy of each of its learned tokens, and their mean or sum."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from grape_ray.errors import ConfigError

IGNORE = -100  # the target of a token that is not learned
_REDUCTIONS = ("mean", "sum")


def check_reduction(name: str) -> None:
    """Refuses a `task.loss` that there is not. Raises ConfigError."""
    if name not in _REDUCTIONS:
        raise ConfigError("task.loss", name, "one of " + ", ".join(_REDUCTIONS))


def of_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (B, T) of each target, zero where there is none, and where there is one.

    Args:
        logits: (B, T, V). targets: (B, T), `IGNORE` where nothing is learned.
    """
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view(targets.shape), targets != IGNORE


def of_examples(losses: Tensor, learned: Tensor, reduction: str) -> Tensor:
    """(B,): the `mean` over an example's learned tokens, or their `sum`.

    Args:
        losses: (B, T), zero where nothing is learned. learned: (B, T) bool.
    """
    total = losses.sum(1)
    return total if reduction == "sum" else total / learned.sum(1).clamp(min=1)
