"""The noise line: `privatize` is the only door from ClippedSum to PrivateGradient."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from grape_ray import types
from grape_ray.comms import Comms
from grape_ray.errors import ConfigError, NoiseReuse
from grape_ray.rng import normals
from grape_ray.types import ClippedSum, NonPrivateGradient, PrivateGradient

_BACKGROUND = ThreadPoolExecutor(1, "noise")


class NoiseStream:
    """The secret noise stream of one attempt; it never gives the noise of a step twice.

    Args:
        key: 32 secret bytes, derived for this attempt alone (`accounting.keys.derive`).

    Raises:
        ConfigError: the key has another length.
    """

    def __init__(self, key: bytes):
        if len(key) != 32:
            raise ConfigError("noise key", f"{len(key)} bytes", "32 secret bytes", "derive it from the master key")
        self._key, self._last = key, -1
        self._ahead: tuple[int, int, Future[np.ndarray]] | None = None

    def __repr__(self) -> str:
        return f"NoiseStream(id={hashlib.sha256(self._key).hexdigest()[:8]}, last_step={self._last})"

    def claim(self, step: int) -> None:
        """Marks `step` as drawn. Raises NoiseReuse unless steps only go up."""
        if step <= self._last:
            raise NoiseReuse(
                "noise of a step that was already drawn", step, f"a step after {self._last}", "begin a new attempt: it has a new key"
            )
        self._last = step

    def draw_ahead(self, step: int, start: int, count: int) -> None:
        """Begins to draw in another thread what `normals` will be asked for at `step`, which must be paid for by now.

        It takes 8 `count` bytes until then, and pays where the gradients are computed elsewhere than on this machine's cores.
        """
        self._ahead = step, start, _BACKGROUND.submit(normals, self._key, step, start, count)

    def normals(self, step: int, start: int, count: int) -> Tensor:
        """Standard normals `start .. start+count` of a step's noise vector, float64."""
        if self._ahead is not None and self._ahead[0] == step:
            drawn, first = self._ahead[2].result(), self._ahead[1]
            if first <= start and start + count <= first + len(drawn):
                return torch.from_numpy(drawn[start - first : start - first + count])
        return torch.from_numpy(normals(self._key, step, start, count))


def privatize(
    summed: ClippedSum,
    stream: NoiseStream,
    *,
    step: int,
    noise_multiplier: float,
    expected_batch_size: float,
    comms: Comms | None = None,
) -> PrivateGradient:
    """The private mean gradient: (sum over ranks of `summed` + N(0, (noise_multiplier * sensitivity)^2)) / expected_batch_size.

    The sum's memory is reused.

    Each rank reduces, noises and divides the slice it owns of the flat vector, then all gather: the noise is drawn once, in
    float64 from a cryptographic stream, and is bitwise the same at any world size. An empty batch is noised like any other.

    Args:
        summed: this rank's clipped sum, the same tensors on every rank.
        stream: this attempt's secret stream, the same on every rank.
        step: global step, each used once and ascending.
        noise_multiplier: standard deviation in units of the sensitivity.
        expected_batch_size: mean of the Poisson batch's size over all ranks; never the realised one, which is private.

    Raises:
        NoiseReuse: the step's noise was drawn before. ConfigError: a number that is not finite and > 0.
    """
    for name, value in (("noise_multiplier", noise_multiplier), ("expected_batch_size", expected_batch_size)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(name, value, "a finite number > 0")
    if not math.isfinite(summed.sensitivity):
        raise ConfigError("sensitivity of the sum", summed.sensitivity, "a finite bound", "method `none` clips nothing: no noise covers it")
    stream.claim(step)
    std = noise_multiplier * summed.sensitivity

    def release(mine: Tensor, start: int) -> Tensor:
        noise = stream.normals(step, start, mine.numel()).mul_(std)
        return mine.add_(noise.to(mine.device, mine.dtype)).div_(expected_batch_size)

    tensors = _by_slices(summed.tensors, comms or Comms.local(), release)
    return PrivateGradient(tensors, step, std / expected_batch_size, types._DOOR)


def nonprivate_mean(summed: ClippedSum, *, step: int, batch_size: float, comms: Comms | None = None) -> NonPrivateGradient:
    """The plain mean gradient of the yardstick: the sum over ranks divided by `batch_size`, no noise, no guarantee."""
    tensors = _by_slices(summed.tensors, comms or Comms.local(), lambda mine, _: mine.div_(max(batch_size, 1)))
    return NonPrivateGradient(tensors, step)


def _by_slices(tensors: Mapping[str, Tensor], comms: Comms, release) -> dict[str, Tensor]:
    """Reduces `tensors` over ranks, passes each owned slice with its global offset through `release`, and gathers."""
    if comms.world_size == 1:
        out, offset = {}, 0
        for group in _groups(tensors):
            flat = torch.cat([t.reshape(-1) for t in group.values()]) if len(group) > 1 else next(iter(group.values())).reshape(-1)
            out |= _split(release(flat, offset), group)
            offset += flat.numel()
        return out
    flat = torch.cat([t.reshape(-1) for t in tensors.values()])
    mine = comms.reduce_slice(flat)
    whole = comms.gather_slices(release(mine.clone(), comms.slice_of(flat.numel())[0]), flat.numel())
    return _split(whole, tensors)


def _split(flat: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([t.numel() for t in tensors.values()])
    return {name: part.view(t.shape) for (name, t), part in zip(tensors.items(), parts)}


def _groups(tensors: Mapping[str, Tensor], numel: int = 1 << 18) -> Iterator[dict[str, Tensor]]:
    """Consecutive tensors together up to `numel` elements: many small ones share one draw, a large one needs no copy."""
    group: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if group and sum(t.numel() for t in group.values()) + tensor.numel() > numel:
            yield group
            group = {}
        group[name] = tensor
    if group:
        yield group
