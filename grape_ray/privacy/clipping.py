"""Clip factors from per-example squared norms: one table of policies, each with L2 sensitivity
clip_norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Smaller factors are zero: in single precision they are no longer rounded by a 2^-24 of themselves,
# and could come out larger.
_LEAST = 2.0**-100
# Bu et al. 2023, "Automatic Clipping": keeps the factor finite and small gradients small
AUTOMATIC_GAMMA = 0.01


def _bounded(squared: Tensor, bound: float) -> Tensor:
    # clamped below the division: the factor is never above 1, and a norm of 0 divides nothing
    return bound / squared.sqrt().clamp(min=bound)


def _flat(squared: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """min(1, C / norm) over all tensors together (Abadi et al. 2016)."""
    factor = _bounded(_total(squared), clip_norm)
    return dict.fromkeys(squared, factor)


def _automatic(squared: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """C / (norm + 0.01): every example has norm just under C."""
    factor = clip_norm / (_total(squared).sqrt() + AUTOMATIC_GAMMA)
    return dict.fromkeys(squared, factor)


def _per_layer(squared: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """Each tensor bounded by C / sqrt(L), so that all L together are bounded by C (McMahan et al.
    2018).
    """
    bound = clip_norm / math.sqrt(max(len(squared), 1))
    return {name: _bounded(s, bound) for name, s in squared.items()}


POLICIES = {"flat": _flat, "automatic": _automatic, "per_layer": _per_layer}


def factors(
    squared: Mapping[str, Tensor], policy: str, clip_norm: float, mask: Tensor | None
) -> dict[str, Tensor]:
    """The factor of every example for every tensor.

    Args:
        squared: parameter name -> squared norms (B,), float64; every trainable tensor is named,
            unused ones with zeros.
        mask: (B,) bool, False for padding.

    Returns:
        name -> (B,) float64 in [0, inf); exactly 0 for padding, for examples any of whose norms is
        not finite, and below 2^-100.
    """
    # one tensor that is not finite silences the example in all: the rest of it is no better
    alive = torch.isfinite(_total(squared))
    if mask is not None:
        alive = alive & mask.to(alive.device)
    made: dict[int, Tensor] = {}
    out: dict[str, Tensor] = {}
    for name, factor in POLICIES[policy](squared, clip_norm).items():
        # flat policies give all tensors one and the same factor
        if id(factor) not in made:
            made[id(factor)] = torch.where(
                alive & (factor >= _LEAST), factor, torch.zeros_like(factor)
            )
        out[name] = made[id(factor)]
    return out


def _total(squared: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(squared.values())).sum(0)
