"""The noise line: `privatize` is the only door from ClippedSum to PrivateGradient.

Sum and noise are rounded to one grid of a power of two and added there without rounding, so that
the result's low bits tell nothing of the sum's: it is a post-processed Gaussian mechanism on the
rounded sum (docs/privacy.md, "Low bits"; Mironov 2012 shows the attack).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from grape_ray.accounting.mechanism import RANDOMIZED, Mechanism
from grape_ray.distributed.comms import Comms
from grape_ray.errors import ConfigError, LedgerError, NoiseReuse
from grape_ray.ledger.grant import Grant
from grape_ray.privacy.random_streams import normals
from grape_ray.privacy.types import (
    _PRIVATIZE,  # pyright: ignore[reportPrivateUsage]
    ClippedSum,
    NonPrivateGradient,
    PrivateGradient,
    step_of,
)

_BELOW_SENSITIVITY = 31  # bits from the sensitivity down to the grid
# bits from the noise's standard deviation down to the grid, at most: normals below 16 times 2^48
# are below 2^52
_BELOW_STD = 47
# of the sum from zero, in grid steps: it and the noise add up below 2^53, where doubles hold every
# integer
_FARTHEST = 2.0**52
# coordinates noised at a time: what stays in a core's cache, work for several cores, and for a GPU
# such that what is made on the way is some hundred MiB
_PIECE, _SHARED_PIECE, _DEVICE_PIECE = 1 << 16, 1 << 20, 1 << 22


class NoiseStream:
    """The secret noise stream of one attempt; it never gives the noise of a step twice.

    Attributes:
        name: tells streams apart, and nothing else of the key.

    Args:
        key: 32 secret bytes, derived for this attempt alone (`privacy.keys.derive`).

    Raises:
        ConfigError: the key has another length.
    """

    def __init__(self, key: bytes):
        if len(key) != 32:
            raise ConfigError(
                "noise key", f"{len(key)} bytes", "32 secret bytes", "derive it from the master key"
            )
        self._key, self._last = key, -1
        self.name = hashlib.sha256(key).hexdigest()[:8]

    def __repr__(self) -> str:
        return f"NoiseStream(id={self.name}, last_step={self._last})"

    def claim(self, step: int) -> None:
        """Marks `step` as drawn. Raises NoiseReuse unless steps only go up."""
        if step <= self._last:
            raise NoiseReuse(
                "noise of a step that was already drawn",
                step,
                f"a step after {self._last}",
                "give clipped_sum each step once",
            )
        self._last = step

    def normals(self, step: int, start: int, count: int, device: torch.device) -> Tensor:
        """Standard normals `start .. start+count` of a step's noise vector, float64, made on
        `device`.
        """
        return normals(self._key, step, start, count, device)


def privatize(
    summed: ClippedSum,
    stream: NoiseStream,
    *,
    grant: Grant,
    expected_batch_size: float,
    step: int | None = None,
    comms: Comms | None = None,
) -> PrivateGradient:
    """The private mean gradient: (sum over ranks of `summed` + N(0, std^2)) / expected_batch_size,
    computed on a grid.

    std is the noise multiplier that the grant was paid for, times the sensitivity, and a trifle
    more for the rounding (`grid_and_std`). The sum's memory is reused.

    Each rank reduces, noises and divides the slice it owns of the flat vector, then all gather: the
    noise is drawn once, in float64 from a cryptographic stream, and is bitwise the same at any
    world size. An empty batch is noised like any other.

    Args:
        summed: this rank's clipped sum, the same tensors on every rank.
        stream: this attempt's secret stream, the same on every rank.
        grant: what `Ledger.charge` returned for the step: proof that it is paid for, and as what.
        expected_batch_size: mean of the Poisson batch's size over all ranks; never the realised
            one, which is private.
        step: the step of `summed`; not needed where the sum carries it, as an engine's does.

    Raises:
        LedgerError: the grant does not cover the step, pays for another mechanism than the sum's
            (norms that are estimates), or has served another stream.
        NoiseReuse: the step's noise was drawn before: each step is used once, ascending.
        GrapeRayError: `step` is not that of the sum.
        ConfigError: a batch size that is not finite and > 0.

    >>> stream, summed = NoiseStream(bytes(32)), ClippedSum({"w": torch.zeros(3)}, 1.0, step=0)
    >>> privatize(summed, stream, grant=None, expected_batch_size=8)
    Traceback (most recent call last):
    grape_ray.errors.LedgerError: noise without a grant, got 'NoneType', expected what ...
    """
    if not (math.isfinite(expected_batch_size) and expected_batch_size > 0):
        raise ConfigError(
            "expected_batch_size",
            expected_batch_size,
            "a finite number > 0",
            "pass the one that the step is paid for with",
        )
    if type(grant) is not Grant:  # a subclass may have been made by anyone
        raise LedgerError(
            "noise without a grant",
            type(grant).__name__,
            "what Ledger.charge returned",
            "charge the step to the ledger first",
        )
    step = step_of(summed, step)
    _check_mechanism(summed, grant.mechanism)
    # before anything is drawn: whatever fails from here on, the step is spent
    grant.claim(step, stream.name)
    stream.claim(step)
    noise_multiplier = grant.mechanism.noise_multiplier
    count = sum(t.numel() for t in summed.tensors.values())
    grid, std = grid_and_std(summed.sensitivity, noise_multiplier, count)

    def release(mine: Tensor, start: int) -> Tensor:
        for low, high in _pieces(start, mine.numel(), _piece(mine.device)):
            part = mine[low:high]
            noise = stream.normals(step, start + low, high - low, mine.device)
            part.copy_(on_grid(part.double(), noise, std, grid).div_(expected_batch_size))
        return mine

    # the noise meets a slice on the rank that owns it, before any rank has the whole sum
    tensors = _by_slices(summed.tensors, comms or Comms.local(), release)
    return PrivateGradient(tensors, step, std / expected_batch_size, summed.period, _PRIVATIZE)


def _check_mechanism(summed: ClippedSum, paid: Mechanism) -> None:
    """Raises LedgerError where the norms of a sum are estimates that the grant does not pay for;
    fewer probes than it has cost no less, and shared ones no less than each example's own.
    """
    if summed.estimated is None:
        return
    probes, shared = summed.estimated
    if paid.name != RANDOMIZED or paid.probes > probes or (shared and not paid.probes_shared):
        ours = f"{probes} {'shared' if shared else 'secret'} probes"
        raise LedgerError(
            "a sum whose norms are estimates",
            f"{ours}, and a grant of {paid}",
            f"a grant of {RANDOMIZED} with these probes",
            "register the study with the mechanism of the method",
        )


def grid_and_std(sensitivity: float, noise_multiplier: float, count: int) -> tuple[float, float]:
    """The grid's step and the noise's standard deviation, from public numbers alone.

    Rounding moves each of `count` coordinates by half a step at most, so two sums that were
    `sensitivity` apart are at most sensitivity + step * sqrt(count) apart on the grid, and the
    noise is made for that: a millionth more for 5 million coordinates.

    Raises:
        ConfigError: the sensitivity is no finite number > 0, or so small or large that the grid
            leaves the range of doubles.
    """
    if not 1e-200 < sensitivity < 1e200:
        raise ConfigError(
            "sensitivity of the sum",
            sensitivity,
            "a finite bound > 0",
            "method `none` clips nothing: no noise covers it",
        )
    std = noise_multiplier * sensitivity
    power = math.frexp(sensitivity)[1] - 1 - _BELOW_SENSITIVITY
    if std > 0:
        power = max(power, math.frexp(std)[1] - 1 - _BELOW_STD)
    # a power of two, so that dividing and multiplying by it rounds nothing
    grid = math.ldexp(1.0, power)
    return grid, noise_multiplier * (sensitivity + grid * math.sqrt(count))


def on_grid(value: Tensor, normal: Tensor, std: float, grid: float) -> Tensor:
    """round(value) + round(std * normal), both to multiples of `grid`, added exactly; float64, in
    the memory of both arguments.

    As value is on the grid before the noise comes, this is the Gaussian mechanism's result on the
    rounded value, rounded. What is farther from zero than 2^52 steps, a million times the
    sensitivity, is moved there first, which brings no two values apart.
    """
    value = value.mul_(1 / grid).clamp_(-_FARTHEST, _FARTHEST).round_()
    return value.add_(normal.mul_(std / grid).round_()).mul_(grid)


def _piece(device: torch.device) -> int:
    if device.type != "cpu":
        return _DEVICE_PIECE
    return _PIECE if torch.get_num_threads() == 1 else _SHARED_PIECE


def _pieces(start: int, count: int, size: int) -> Iterator[tuple[int, int]]:
    """Cuts `count` places that begin at place `start` of the noise into pieces that end where the
    noise's own chunks do.
    """
    low = 0
    while low < count:
        high = min(count, low + size - (start + low) % size)
        yield low, high
        low = high


def nonprivate_mean(
    summed: ClippedSum, *, batch_size: float, step: int | None = None, comms: Comms | None = None
) -> NonPrivateGradient:
    """The plain mean gradient of the non-private baseline: the sum over ranks divided by
    `batch_size`, no noise, no guarantee.
    """
    tensors = _by_slices(
        # an empty batch has a sum of zeros
        summed.tensors,
        comms or Comms.local(),
        lambda mine, _: mine.div_(max(batch_size, 1)),
    )
    return NonPrivateGradient(tensors, step_of(summed, step), period=summed.period)


def _by_slices(
    tensors: Mapping[str, Tensor], comms: Comms, release: Callable[[Tensor, int], Tensor]
) -> dict[str, Tensor]:
    """Reduces `tensors` over ranks, passes each owned slice with its global offset through
    `release`, and gathers.
    """
    if comms.world_size == 1:
        out: dict[str, Tensor] = {}
        offset = 0
        for group in _groups(tensors):
            flat = (
                torch.cat([t.reshape(-1) for t in group.values()])
                if len(group) > 1
                else next(iter(group.values())).reshape(-1)
            )
            out |= _split(release(flat, offset), group)
            offset += flat.numel()
        return out
    flat = torch.cat([t.reshape(-1) for t in tensors.values()])
    mine = comms.reduce_slice(flat)
    whole = comms.gather_slices(
        release(mine.clone(), comms.slice_of(flat.numel())[0]), flat.numel()
    )
    return _split(whole, tensors)


def _split(flat: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts: Sequence[Tensor] = torch.split(flat, [t.numel() for t in tensors.values()])
    return {name: part.view(t.shape) for (name, t), part in zip(tensors.items(), parts)}


def _groups(tensors: Mapping[str, Tensor], numel: int = 1 << 18) -> Iterator[dict[str, Tensor]]:
    """Consecutive tensors together up to `numel` elements: many small ones share one draw, a large
    one needs no copy.
    """
    group: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if group and sum(t.numel() for t in group.values()) + tensor.numel() > numel:
            yield group
            group = {}
        group[name] = tensor
    if group:
        yield group
