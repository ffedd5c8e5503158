"""Many steps together: the sum of independent losses by FFT, tilted so that no rounding reaches the
tail, and every error added to delta.

For a sum S of T losses with finite part of distribution p, delta(e) = P(S = inf) + sum over x > e
of p^T(x) (1 - e^(e - x)). With p_tilted(x) = p(x) e^(theta x) / M, M = sum p(x) e^(theta x), it is

    delta(e) - P(S = inf) = M^T e^(-theta e) sum over x > e of p_tilted^T(x) e^(-theta (x - e)) (1 -
    e^(e - x)).

With theta near the saddle point the sum runs over the middle of the tilted distribution, so that an
error of the convolution counts in proportion to delta, not beside it.
"""

# scipy's functions have no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy import fft

from grape_ray.accounting.losses import Losses
from grape_ray.accounting.roots import boundary

_UNIT = np.finfo(np.float64).eps / 2
_OUTSIDE = 1e-17  # tilted probability beyond either end of the window; it is added
# times u log2(N) the 2-norm: an FFT's error in 2-norm; about 7 for radix 2 (Higham 2002, theorem
# 24.2)
_FFT = 16
_TILTS = np.concatenate([[0.0], np.geomspace(1e-4, 1e5, 80)])
_BLOCKS = 4096
# share of delta above which a convolution's error bound is worth extended precision
_BLURRED = 1e-3
# of a window; where more are needed, as for epsilons of many thousands, Chernoff's bound stands
# alone
_MOST_CELLS = 1 << 23

# Shapes: n cells of one step, N cells of the composition's window.


@dataclass(frozen=True)
class _Tilted:
    """The tilted sum on a window: losses (N,), cells (N,) within `off` of the truth in 2-norm, and
    what its numbers are good to.
    """

    theta: float
    log_scale: float  # T log M
    losses: np.ndarray
    cells: np.ndarray  # none where the window would be too large
    off: float
    relative: float


class Composition:
    """`steps` adaptively composed steps whose losses are dominated by `losses`, in one
    direction.
    """

    def __init__(self, losses: Losses, steps: int):
        self._one, self._steps = losses, steps
        kept = np.flatnonzero(losses.probs)
        first, last = (int(kept[0]), int(kept[-1]) + 1) if len(kept) else (0, 1)
        self._probs = losses.probs[first:last]
        self._numbers = np.arange(losses.lower + first, losses.lower + last)
        with np.errstate(divide="ignore"):
            self._logs = np.log(self._probs)
        self._slip = steps * losses.slip
        # 1 - (1 - p)^T; as a difference it would lose a small p altogether
        self._infinite = -math.expm1(steps * math.log1p(-min(losses.infinite, 1 - 1e-16)))

    def delta(self, epsilon: float) -> float:
        """An upper bound on delta at this epsilon."""
        theta = self._tilt(-_TILTS * epsilon)
        tilted = self._tilted(theta)
        if self._blurred(tilted, epsilon):
            tilted = self._tilted(theta, np.longdouble)
        return self._bound(tilted, epsilon)

    def epsilon(self, delta: float) -> float:
        """An epsilon at which `delta` holds; infinite where rounding or infinite losses leave
        none.
        """
        # no epsilon covers an infinite loss
        if self._infinite >= delta:
            return math.inf
        theta = self._tilt(np.full_like(_TILTS, -math.log(delta)), divide=True)
        tilted = self._tilted(theta)
        found = self._least(tilted, delta)
        if self._blurred(tilted, found):
            found = min(found, self._least(self._tilted(theta, np.longdouble), delta))
        return found

    def _least(self, tilted: _Tilted, delta: float) -> float:
        """The least epsilon whose bound is at most `delta`, to a billionth."""
        if self._bound(tilted, 0.0) <= delta:
            return 0.0
        # Chernoff's bound, at which all of the tilted sum would do.
        high = 1.01 * (
            (tilted.log_scale - math.log(delta - self._infinite)) / tilted.theta + self._slip
        )
        if self._bound(tilted, high) > delta:
            return math.inf

        # A logarithm, since that is nearly straight: each value is a sum over the window, and a few
        # of them lead to the end.
        def excess(negated: float) -> float:
            return math.log(max(self._bound(tilted, -negated), 1e-300) / delta)

        found = boundary(excess, -high, (-high, 0.0), 1e-9 * high + 1e-12, high / 8)
        assert found is not None  # the bound at `high` will do
        return -found

    @functools.cached_property
    def _log_moments(self) -> np.ndarray:
        """T log M at each of `_TILTS`, roughly: from blocks of cells at their means; infinite where
        blocks are too wide to tell.
        """
        size = -(-len(self._probs) // _BLOCKS)
        blocks, places = (np.pad(values, (0, -len(values) % size)).reshape(-1, size).sum(1)
                          for values in (self._probs, self._probs * self._numbers))  # fmt: skip
        blocks, places = blocks[blocks > 0], places[blocks > 0]
        exponents = _TILTS[:, None] * (places / blocks * self._one.spacing) + np.log(blocks)
        top = exponents.max(1)
        found = self._steps * (top + np.log(np.exp(exponents - top[:, None]).sum(1)))
        return np.where((size == 1) | (_TILTS * size * self._one.spacing < 1), found, np.inf)

    def _tilt(self, beside: np.ndarray, divide: bool = False) -> float:
        """The tilt at which Chernoff's bound is best; any other one gives a bound, too, but a less
        exact one.
        """
        bound = self._log_moments + beside
        if divide:
            bound = np.append(np.inf, (self._log_moments + beside)[1:] / _TILTS[1:])
        return float(_TILTS[int(np.argmin(bound))])

    def _tilted(self, theta: float, dtype: type = np.float64) -> _Tilted:
        one, steps = self._one, self._steps
        x = self._numbers * one.spacing
        exponents = theta * x + self._logs
        # taken out of the exponentials, which would overflow
        top = exponents.max()
        log_mass = float(top + math.log(np.exp(exponents - top).sum()))
        tilted = np.exp(exponents - log_mass)
        first, size = self._window(tilted, x)
        if size > _MOST_CELLS:
            return _Tilted(theta, steps * log_mass, np.zeros(0), np.zeros(0), 0.0, 1e-6)
        # a cyclic convolution adds up what is alike modulo the window, where the sum itself has
        # next to nothing outside (`_window`)
        folded = np.bincount(np.arange(len(tilted)) % size, weights=tilted, minlength=size)
        transform = np.asarray(fft.rfft(folded.astype(dtype)))
        cells = np.asarray(fft.irfft(_power(transform, steps), size), dtype=np.float64)
        start = first - steps * int(self._numbers[0])
        losses = (first + np.arange(size)) * one.spacing
        length = float(np.linalg.norm(folded))
        unit = float(np.finfo(dtype).eps) / 2
        lost = _FFT * unit * math.log2(size)
        # |(F + e)^T - F^T| <= T |e| (1 + |e|)^(T - 1) for |F| <= 1, where |e| is at most the
        # transform's error in 2-norm.
        largest = lost * math.sqrt(size) * length
        off = length * (
            steps * (lost * math.exp(min(steps * largest, 700.0)) + 3 * unit) + 2 * lost
        )
        exponent = theta * float(np.abs(x).max()) + 750 + abs(log_mass)
        relative = (
            4
            * _UNIT
            * (steps * exponent + size + len(tilted) + theta * float(np.abs(losses).max()))
        )
        return _Tilted(
            theta, steps * log_mass, losses, np.roll(cells, -(start % size)), off, relative
        )

    def _window(self, tilted: np.ndarray, x: np.ndarray) -> tuple[int, int]:
        """The number of the first cell and the count, a power of two, outside of which the sum lies
        with probability 2e-17 at most.
        """
        mean = float(tilted @ x)
        spread = math.sqrt(max(float(tilted @ (x - mean) ** 2), self._one.spacing**2))
        ends: list[float] = []
        for sign in (-1.0, 1.0):
            rate = math.sqrt(-2 * math.log(_OUTSIDE) / self._steps) / spread
            span = float(x[-1]) - mean if sign > 0 else mean - float(x[0])
            reach = self._steps * span  # all there is
            while rate * reach > 1:
                if rate * span < 700:  # Chernoff's bound at this rate, within the range of doubles
                    moment = float(tilted @ np.exp(sign * rate * (x - mean)))
                    found = (self._steps * math.log(moment) - math.log(_OUTSIDE)) / rate
                    if found > reach:
                        break
                    reach = found
                rate /= 2
            ends.append(self._steps * mean + sign * reach)
        first = math.floor(ends[0] / self._one.spacing) - 1
        last = math.ceil(ends[1] / self._one.spacing) + 1
        return first, 1 << max(4, (last - first).bit_length())

    def _inside(self, tilted: _Tilted, epsilon: float) -> tuple[float, float]:
        """The tilted sum over losses above epsilon as it was computed, and how far the convolution
        may have been off.
        """
        # true losses may lie higher than their cells by the slip
        level = epsilon - self._slip
        first, count = int(np.searchsorted(tilted.losses, level, side="right")), len(tilted.losses)
        reach = tilted.theta * self._one.spacing
        last = min(count, first + math.ceil(-math.log(_OUTSIDE) / reach)) if reach > 0 else count
        over = tilted.losses[first:last] - level
        weights = np.exp(-tilted.theta * over) * -np.expm1(-over)
        # Beyond the last, all of the probability together weighs less than _OUTSIDE; and so does
        # what lies beyond either end of the window.
        return (
            float(tilted.cells[first:last] @ weights),
            tilted.off * float(np.linalg.norm(weights)) + 3 * _OUTSIDE,
        )

    def _blurred(self, tilted: _Tilted, epsilon: float) -> bool:
        """Whether the convolution's error bound is a good part of delta here, and a longer float,
        where there is one, would help.
        """
        if not len(tilted.cells) or np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
            return False
        computed, off = self._inside(tilted, min(epsilon, float(tilted.losses[-1])))
        return off > _BLURRED * abs(computed)

    def _bound(self, tilted: _Tilted, epsilon: float) -> float:
        level = epsilon - self._slip
        inside = sum(self._inside(tilted, epsilon)) if len(tilted.cells) else 1.0
        exponent = tilted.log_scale - tilted.theta * level
        relative = tilted.relative + 4 * _UNIT * (abs(tilted.log_scale) + abs(tilted.theta * level))
        if inside <= 0:
            return self._infinite
        return min(1.0, self._infinite + math.exp(min(exponent + math.log(inside) + relative, 0.0)))


def _power(values: np.ndarray, exponent: int) -> np.ndarray:
    """values^exponent by squaring: exponent - 1 products, each good to sqrt(5) u of its magnitude
    (Brent, Percival and Zimmermann 2007).
    """
    result = None
    while exponent:
        if exponent & 1:
            result = values if result is None else result * values
        exponent >>= 1
        if exponent:
            values = values * values
    assert result is not None
    return result
