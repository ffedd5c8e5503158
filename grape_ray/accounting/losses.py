"""Privacy losses of one step on a grid, never below the truth: connect the dots (Doroshenko et al.
2022) with its rounding bounded.

Between neighbouring losses x and x + h of the grid, an interval of outcomes with probability p
under one dataset and m under the other is replaced by two outcomes at x and x + h that have p and m
together (m = sum of probability * e^-loss): no test loses by it.
"""

# scipy's functions have no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

_UNIT = np.finfo(np.float64).eps / 2
# standard deviations beyond which outcomes count as an infinite loss: 2e-28 of the probability
_REACH = 11.0
# beyond, e^loss is near the end of doubles, and an interval counts at its upper end
_LARGEST = 600.0

# Shapes: n cells of the grid.


@dataclass(frozen=True)
class Losses:
    """A distribution of losses that dominates one step's in one direction (removing or adding an
    example).

    Attributes:
        lower: number of the first cell; cell i stands for the loss (lower + i) * spacing.
        probs: (n,) probabilities, together with `infinite` at least 1. infinite: probability of an
            infinite loss.
        slip: how far a true loss may lie above the cell that stands for it, by the rounding of
            cells' borders.
    """

    lower: int
    spacing: float
    probs: np.ndarray
    infinite: float
    slip: float = 0.0


def gaussian(sigma: float, q: float, spacing: float) -> tuple[Losses, Losses]:
    """Of a subsampled Gaussian step, (1 - q) N(0, sigma^2) + q N(1, sigma^2) beside N(0, sigma^2),
    q < 1, for removing and for adding.
    """
    farthest = (1 + 2 * _REACH * sigma) / (2 * sigma**2)
    top = farthest + math.log(q + (1 - q) * math.exp(-farthest))
    low, high = math.floor(math.log1p(-q) / spacing), math.ceil(top / spacing)
    x = np.arange(low, high + 1) * spacing
    borders = _borders(x, sigma, q)
    without, without_off = _between(borders / sigma)
    shifted, shifted_off = _between((borders - 1) / sigma)
    mixed = (1 - q) * without + q * shifted
    mixed_off = (1 - q) * without_off + q * shifted_off + 4 * _UNIT * mixed
    with np.errstate(over="ignore"):
        grows, falls = np.exp(np.minimum(x[:-1], _LARGEST)), np.exp(-x[1:])
    rise = _upper(mixed, mixed_off, without, without_off, grows, x[:-1], spacing)
    rise = np.where(x[:-1] < _LARGEST, rise, mixed + mixed_off)
    removing = np.append(mixed + mixed_off - rise, 0.0)
    removing[1:] += rise
    # the outcomes above the last border count as an infinite loss
    beyond = float((1 - q) * ndtr(-borders[-1] / sigma) + q * ndtr((1 - borders[-1]) / sigma)) * (
        1 + 1e-12
    )
    rise = _upper(without, without_off, mixed, mixed_off, falls, x[1:], spacing)
    adding = np.append(rise, float(ndtr(-borders[-1] / sigma)) * (1 + 1e-12))
    adding[1:] += without + without_off - rise
    largest = float(np.abs(borders[1:-1]).max(initial=1.0)) / sigma**2 + max(-x[0], x[-1])
    slip = 16 * _UNIT * (2 / (1 - q) + largest)
    # the loss of adding is minus that of removing, so its cells are read backwards
    return Losses(low, spacing, removing, beyond, slip), Losses(
        -high, spacing, adding[::-1], 0.0, slip
    )


def _borders(x: np.ndarray, sigma: float, q: float) -> np.ndarray:
    """The outcomes (n,) at which the loss log(1 - q + q e^((2t - 1) / (2 sigma^2))) takes the
    values x; the first at -infinity.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        near = np.log((np.expm1(np.minimum(x, 1.0)) + q) / q)
        far = x + np.log1p((q - 1) * np.exp(-np.maximum(x, 1.0))) - math.log(q)
        found = sigma**2 * np.where(x < 1, near, far) + 0.5
    found = np.where(np.isnan(found), -np.inf, found)
    found[0] = -np.inf
    # rounding may not put borders out of their order
    return np.maximum.accumulate(found)


def _between(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability of a standard normal between neighbouring points (n - 1,), from the nearer tail,
    and how far off it may be.
    """
    left, right = z[:-1], z[1:]
    below = right <= 0
    # a difference of two upper tails near 1 would be all rounding
    large = np.where(below, ndtr(right), ndtr(-left))
    small = np.where(below, ndtr(left), ndtr(-right))
    # a tail's relative error grows with its exponent
    nearest = np.minimum(np.where(below, right, left) ** 2, 1e6)
    return large - small, 2 * _UNIT * (8 + np.where(large > 0, nearest, 0.0)) * large


def _upper(
    p: np.ndarray,
    p_off: np.ndarray,
    m: np.ndarray,
    m_off: np.ndarray,
    weight: np.ndarray,
    x: np.ndarray,
    h: float,
) -> np.ndarray:
    """The part of p + p_off that goes to the upper end of each interval, an upper bound: (p -
    weight m) / (1 - e^-h).
    """
    off = p_off + weight * m_off + (4 + np.abs(x)) * _UNIT * (p + weight * m)
    return np.clip((p - weight * m + p_off + off) / -math.expm1(-h), 0.0, p + p_off)


def connected(lower: int, spacing: float, deltas: np.ndarray) -> Losses:
    """The losses whose hockey-stick divergence is at least `deltas` (n,) at the cells from `lower`
    on, and so at all between them.

    Second differences leave rounding, so the divergence of what was found is computed in extended
    precision and what it lacks is made up by an infinite loss.
    """
    falls = np.diff(deltas)
    probs = np.empty_like(deltas)
    probs[1:-1] = (falls[1:] - falls[:-1] * math.exp(spacing)) / math.expm1(spacing)
    probs[-1] = falls[-1] / math.expm1(-spacing)
    probs[1:] = np.maximum(probs[1:], 0.0)
    probs[0] = max(0.0, 1 - deltas[-1] - probs[1:].sum()) + 8 * _UNIT
    x = np.arange(len(deltas), dtype=np.longdouble) * np.longdouble(spacing)
    above = np.cumsum(probs[::-1].astype(np.longdouble))[::-1]
    weighted = np.cumsum((probs.astype(np.longdouble) * np.exp(-x))[::-1])[::-1]
    # sum over cells above of p (1 - e^(x - loss)); the cell itself adds nothing
    reached = above - np.exp(x) * weighted
    rounding = 8 * len(deltas) * float(np.finfo(np.longdouble).eps)
    lacks = max(0.0, float((deltas - deltas[-1] - reached).max()))
    return Losses(lower, spacing, probs, float(deltas[-1]) + lacks + rounding)
