"""The privacy loss of a step whose clipping norms are estimated with Gaussian probes
(docs/privacy.md, lemmas 1 to 4).
"""

# scipy's functions have no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import functools
import math

import numpy as np
from scipy.special import gammainc, gammaincc, gammainccinv, gammaincinv, log_ndtr, ndtr

from grape_ray.accounting.losses import Losses, connected
from grape_ray.accounting.mechanism import Mechanism

# Shapes: N nodes of the estimate, M thresholds or levels of the profile.
_NODES = 700
_TAIL = 1e-14  # probability beyond the outermost nodes, which is charged at them
_LARGEST_LOSS = 100.0  # a larger loss of one step counts as infinite
_NEGLIGIBLE = 1e-17
_UNORDERED = 1e-12

Profile = tuple[np.ndarray, np.ndarray]  # increasing epsilons, and upper bounds on delta at each


def one_step(mechanism: Mechanism, spacing: float) -> tuple[Losses, Losses]:
    """Losses that dominate one step of ``poisson_randomized``, on multiples of the spacing, for
    removing and for adding an example.

    At worst the estimate of an example's squared norm is R = chi2_k / k times the square, so that
    its contribution reaches ``clip_norm / sqrt(R)`` (Lemma 2). Shared probes are taken as released
    (Lemma 1); secret ones only blur the noise (Lemma 4).

    Args:
        mechanism: ``poisson_randomized`` with its probes.
        spacing: distance of neighbouring privacy losses.
    """
    remove, add = _profiles(mechanism)
    return _connect(*remove, spacing), _connect(*add, spacing)


def worst_estimate(probes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (N,) and weights (N,) above R = chi2_k / k in the convex order: E f(R) <= sum(weights *
    f(nodes)), f convex and decreasing.

    Each cell's probability goes to its two ends so that mass and mean are kept (Edmundson and
    Madansky); what lies beyond the last node goes to that node.
    """
    half = probes / 2
    nodes = (
        np.concatenate(
            [[0.0], np.geomspace(gammaincinv(half, _TAIL), gammainccinv(half, _TAIL), _NODES)]
        )
        / half
    )
    # E[R; cell] is a gamma probability, for E R = 1
    mass, mean = _cells(half, half * nodes), _cells(half + 1, half * nodes)
    right = np.clip((mean - mass * nodes[:-1]) / np.diff(nodes), 0.0, mass)
    weights = np.append(mass - right, gammaincc(half, half * nodes[-1]))
    weights[1:] += right
    return nodes, weights


def _cells(shape: float, points: np.ndarray) -> np.ndarray:
    """Probability of a gamma variable between neighbouring points, from whichever tail is
    nearer.
    """
    return np.where(
        points[1:] < shape, np.diff(gammainc(shape, points)), -np.diff(gammaincc(shape, points))
    )


@functools.lru_cache(maxsize=4)
def _profiles(mechanism: Mechanism) -> tuple[Profile, Profile]:
    """The privacy profiles for removing and for adding an example."""
    nodes, weights = worst_estimate(mechanism.probes)
    profile = _shared if mechanism.probes_shared else _secret
    return profile(nodes, weights, mechanism.noise_multiplier, mechanism.sampling_prob)


def _shared(
    nodes: np.ndarray, weights: np.ndarray, sigma: float, q: float
) -> tuple[Profile, Profile]:
    """Lemma 1: q times the mean, over the estimate, of the Gaussian mechanism's delta at the level
    that subsampling leaves.
    """
    levels = np.concatenate(
        [np.arange(-30, 30, 0.02), np.arange(30, _LARGEST_LOSS - math.log(q) + 1, 0.2)]
    )
    mean = np.concatenate(
        [_mean_delta(part, nodes, weights, sigma) for part in np.array_split(levels, 8)]
    )
    # a majorant may exceed 1, a probability does not
    mean = np.minimum(mean, 1.0)
    with np.errstate(divide="ignore"):
        remove = np.log1p(q * np.expm1(levels)), q * mean
        add = -np.log1p(q * np.expm1(-levels)), mean * q / (q + (1 - q) * np.exp(levels))
    return remove, add


def _mean_delta(
    levels: np.ndarray, nodes: np.ndarray, weights: np.ndarray, sigma: float
) -> np.ndarray:
    """E of the convex majorant of x -> delta of the Gaussian mechanism with shift x^(-1/2) / sigma,
    at each level (M,).
    """
    e = levels[:, None]
    # Steepest where 3 = (w/2 - e/w)(w/2 + e/w): concave on its left, convex on its right; the
    # majorant is the tangent from there on.
    turn = np.sqrt(2 * (3 + np.sqrt(9 + e**2)))
    x_turn = (sigma * turn) ** -2.0
    slope = -0.5 * sigma**2 * turn**3 * _density(turn / 2 - e / turn)
    with np.errstate(divide="ignore"):
        shift = np.minimum(nodes**-0.5 / sigma, turn)
    delta = ndtr(shift / 2 - e / shift) - np.exp(e + log_ndtr(-shift / 2 - e / shift))
    return (delta + slope * np.minimum(nodes - x_turn, 0.0)) @ weights


def _secret(
    nodes: np.ndarray, weights: np.ndarray, sigma: float, q: float
) -> tuple[Profile, Profile]:
    """Lemma 4: the step is N(0,1) against a mixture with an increasing likelihood ratio, so
    thresholds t are the best tests.
    """
    thresholds = np.arange(-10.0, 25.0, 0.008)
    parts = [
        _threshold_tests(part, nodes, weights, sigma) for part in np.array_split(thresholds, 8)
    ]
    power, miss, ratio = (np.concatenate(columns) for columns in zip(*parts))
    # Where the majorant exceeds 1 it is replaced by 1, a tighter one.
    power = np.minimum(power, 1.0)
    ratio = np.where(miss > 0, ratio, 0.0)
    miss = np.maximum(miss, 0.0)
    falls = np.flatnonzero(np.diff(ratio) < -1e-9 * np.abs(ratio[1:]))  # more than rounding
    # from here on only the node at 0 counts; the rest is an infinite loss
    end = int(falls[0]) + 1 if len(falls) else len(ratio)
    if end < len(ratio) and power[end - 1] > _UNORDERED:
        # too little noise for tests to be ordered; releasing the probes only costs more
        return _shared(nodes, weights, sigma, q)
    thresholds, power, miss, ratio = thresholds[:end], power[:end], miss[:end], ratio[:end]
    with np.errstate(divide="ignore"):
        log_ratio = np.maximum.accumulate(np.log1p(q * (ratio - 1)))
    remove = log_ratio, q * (power - ratio * ndtr(-thresholds))
    add = -log_ratio, q * (ratio * ndtr(thresholds) - miss) * np.exp(-log_ratio)
    usual = thresholds < 9  # beyond, adding has no probability left in double precision
    return remove, (add[0][usual][::-1], add[1][usual][::-1])


def _threshold_tests(
    t: np.ndarray, nodes: np.ndarray, weights: np.ndarray, sigma: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bounds (M,) on the chance of the shifted noise to exceed t and to stay below it, and the
    density ratio that goes with them.
    """
    t = t[:, None]
    root = np.sqrt(t**2 + 12)
    turn = np.where(t > 0, (t + root) / 2, 6 / (root - t))  # steepest where (w - t) w = 3
    x_turn, over = (sigma * turn) ** -2.0, turn - t
    slope = -0.5 * sigma**2 * turn**3 * _density(over)
    with np.errstate(divide="ignore"):
        shift = np.minimum(nodes**-0.5 / sigma, turn)
    left = np.minimum(nodes - x_turn, 0.0)  # below the turning point the majorant is its tangent
    power = (ndtr(shift - t) + slope * left) @ weights
    miss = (ndtr(t - shift) - slope * left) @ weights
    # Minus the power's derivative in t, over the density of N(0,1) at t.
    tangent = 0.5 * sigma**2 * turn**3 * over * np.exp(turn * t - turn**2 / 2)
    ratio = (np.exp(shift * t - shift**2 / 2) + tangent * left) @ weights
    return power, miss, ratio


def _density(x: np.ndarray) -> np.ndarray:
    """Density of N(0,1)."""
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def _connect(epsilons: np.ndarray, deltas: np.ndarray, spacing: float) -> Losses:
    """The loss distribution above a profile: delta is convex in e^epsilon, so chords lie above it
    (Lemma 3, connect the dots).
    """
    deltas = np.minimum.accumulate(np.clip(deltas, 0.0, 1.0))
    finite = np.isfinite(epsilons)
    epsilons, deltas = epsilons[finite], deltas[finite]
    # repeated levels, where subsampling bounds the loss
    grows = np.append(True, np.diff(epsilons) > 1e-12)
    epsilons, deltas = epsilons[grows], deltas[grows]
    enough = int(np.searchsorted(-deltas, -_NEGLIGIBLE))
    top = min(_LARGEST_LOSS, float(epsilons[min(enough, len(epsilons) - 1)]))
    low = max(math.floor(epsilons[0] / spacing), math.floor(-_LARGEST_LOSS / spacing))
    grid = np.arange(low, max(low + 1, math.ceil(top / spacing)) + 1)
    at = grid * spacing
    i = np.clip(np.searchsorted(epsilons, at, side="right") - 1, 0, len(epsilons) - 2)
    part = np.expm1(at - epsilons[i]) / np.expm1(epsilons[i + 1] - epsilons[i])
    chord = deltas[i] + np.clip(part, 0.0, 1.0) * (deltas[i + 1] - deltas[i])
    below = 1 - (1 - deltas[0]) * np.exp(np.minimum(at - epsilons[0], 0.0))  # chord to (e^-inf, 1)
    values = np.minimum.accumulate(np.clip(np.where(at < epsilons[0], below, chord), 0.0, 1.0))
    return connected(int(grid[0]), spacing, values)
