"""A forward pass made again, which shows what an example's loss depends on.

* *on no other example, and on no random number that examples share*: the pass is repeated with the
  other examples exchanged, for extreme and for undefined ones where they are real numbers, and with
  them the random numbers that do not visibly belong to an example. The losses of the rest must not
  change by a single bit, nor their gradients beyond rounding.
* *on no earlier pass*: that repetition comes after passes over other examples, and no weight or
  buffer may have changed.
* *not on the number of examples*: a part of the batch alone, and the batch with the others' masks
  exchanged as well, must give the same losses up to rounding, since other shapes and masks may take
  other paths.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from grape_ray.engines.capture import row_layout
from grape_ray.engines.capture.batches import Batch, mapped
from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.dependence import Dependence
from grape_ray.engines.capture.model_state import ModelSnapshot, written
from grape_ray.engines.capture.random_state import random_states, same_generators, set_states
from grape_ray.engines.capture.tap import Tap
from grape_ray.engines.capture.tracked import Tracked
from grape_ray.engines.verification.exchange import ExchangedDraws, WithoutDropout, exchanged
from grape_ray.engines.verification.ownership import (
    GradientSums,
    gradient_sums,
    same_gradients,
    same_in_part,
)
from grape_ray.errors import UnsupportedLayer

_EXTREMES = (1e12, float("nan"))  # what the others' real numbers are multiplied by


class Observation(NamedTuple):
    """What is seen of one pass: its losses (B,), the uses of parameters, and what all losses
    together bring to each.
    """

    losses: Tensor
    taps: list[Tap]
    sums: GradientSums


class Repetition:
    """A forward pass that can be made again: the same random numbers, and other examples beside the
    same ones.

    Args:
        forward: (batch, B) -> losses (B,). state: random states from before the pass
            (`random_states`).
        tolerance: of a comparison where shapes differ, relative to the largest loss.
    """

    def __init__(
        self,
        capture: CapturePass,
        forward: Callable[[Batch, int], Tensor],
        batch: Batch,
        state: list,
        tolerance: float,
    ):
        self._capture, self._forward, self._batch = capture, forward, batch
        self._examples, self._state, self._tolerance = capture.examples, state, tolerance

    def check(
        self, observed: Observation, snapshot: ModelSnapshot, seen: Dependence, thorough: bool
    ) -> None:
        """Raises UnsupportedLayer where an example's loss depends on other examples, on random
        numbers that are shared, or on what came before.

        Args:
            observed: the pass as it was. snapshot: the model from before it. seen: what was noticed
                of its random numbers.
            thorough: exchange one random half of the examples and the other; otherwise one.
        """
        before = random_states(self._capture.device)
        try:
            # bit by bit: writes past torch (`.data`, NumPy) leave versions as they were
            contents = snapshot.contents()
            self._compare(observed, seen, thorough)
            for name, content in snapshot.contents().items():
                if contents.get(name) != content:
                    raise written(name)
        finally:
            set_states(before)

    def _compare(self, observed: Observation, seen: Dependence, thorough: bool) -> None:
        # of one example there are no others, but memory and generators are looked at all the same
        halves = (
            row_layout.random_halves(self._examples)
            if self._examples > 1
            else torch.zeros(1, 1, dtype=torch.bool)
        )
        used = list(enumerate(halves))[: 2 if thorough else 1]
        for number, others in used:
            self._beside_exchanged(observed, others, number, seen)
        # after passes over other examples: whatever a model keeps of them shows now
        plain = self._losses(self._batch)
        if not same_generators(self._state, random_states(self._capture.device)):
            raise UnsupportedLayer(
                "a random number in the forward pass",
                "one of NumPy's or Python's global generator",
                "random numbers of torch, which are drawn for each example and repeat with the"
                " step",
                "draw it with torch",
            )
        self._close(
            "the loss of an example by the engine's rules", "by torch alone", observed.losses, plain
        )
        if self._examples == 1:
            return
        for _, others in used:
            masked = self._losses(exchanged(self._batch, others, 1.0, masks=True))
            self._close(
                "the loss of an example", "beside other masks", plain[~others], masked[~others]
            )
        if not seen.drew:  # in a smaller batch the same draws would be other examples'
            self._count(observed, plain, halves[0], seen.masked)

    def _beside_exchanged(
        self, observed: Observation, others: Tensor, number: int, seen: Dependence
    ) -> None:
        losses, taps, sums = observed
        beside, met, brought = self._with_exchanged(others, number)
        kept = ~others
        if not _same(losses[kept], beside[kept]):
            # laid out in memory as exchanged examples are, which decides on some roundings
            losses, taps, sums = self._again(taps)
            if not _same(losses[kept], beside[kept]):
                self._explain(observed.losses, losses, beside, others, number, seen.drew)
        if [(t.key, t.lead) for t in taps] == [(t.key, t.lead) for t in met]:
            same_gradients(
                taps, sums, brought, kept, self._tolerance, "another gradient beside other examples"
            )

    def _count(self, observed: Observation, plain: Tensor, half: Tensor, masked: bool) -> None:
        """Compares some examples in the whole batch and in one of their own: losses, without
        dropout, whose masks differ, or gradients.
        """
        picked = half.nonzero().squeeze(1)
        few = mapped(self._batch, lambda t: t[picked.to(t.device)])
        if masked:
            whole = self._losses(self._batch, mode=WithoutDropout())
            alone = self._losses(few, len(picked), WithoutDropout())
            self._close("the loss of an example", "in a smaller batch", whole[picked], alone)
            return
        _, taps, sums = observed
        alone, met, brought = self._observe(
            few, Dependence(len(picked), self._capture.constants, Tracked)
        )
        self._close("the loss of an example", "in a smaller batch", plain[picked], alone)
        if [t.key for t in taps] == [t.key for t in met]:
            same_in_part(taps, sums, met, brought, picked, self._examples, self._tolerance)

    def _with_exchanged(self, others: Tensor, number: int, draws: bool = True) -> Observation:
        """The pass with `others` exchanged, and what they draw; where a model fails on what that
        gives, with less exchanged.
        """
        constants, high = self._capture.constants, bool(number)
        # a model may rightly fail on numbers that no record holds
        for scale in (_EXTREMES[number], 1.0):
            mode = (
                ExchangedDraws(self._examples, constants, Tracked, others, high)
                if draws
                else Dependence(self._examples, constants, Tracked)
            )
            batch = exchanged(self._batch, others, scale)
            try:
                return self._observe(batch, mode)
            except UnsupportedLayer:
                raise
            except Exception:
                if scale == 1.0:
                    raise
        raise AssertionError("unreachable")

    def _again(self, known: list[Tap]) -> Observation:
        """The pass once more, as it is, with the layouts of `known` uses."""
        mode = Dependence(self._examples, self._capture.constants, Tracked)
        losses, taps, sums = self._observe(mapped(self._batch, torch.clone), mode)
        for tap, old in zip(taps, known):
            tap.layout, tap.consistent = old.layout, old.consistent
        return Observation(losses, taps, sums)

    def _observe(self, batch: Batch, mode: Dependence) -> Observation:
        set_states(self._state)
        with self._capture.separate_pass(mode) as taps, torch.enable_grad():
            losses = mode.over(self._forward, batch)
            everyone = torch.ones(mode.examples, dtype=torch.bool)
            learns = losses.requires_grad
            sums = gradient_sums(self._capture, taps, losses, everyone) if learns else []
            return Observation(losses.detach(), taps, sums)

    def _losses(
        self, batch: Batch, examples: int | None = None, mode: TorchFunctionMode | None = None
    ) -> Tensor:
        set_states(self._state)
        context: AbstractContextManager = mode if mode is not None else nullcontext()
        with torch.no_grad(), context:
            return self._forward(mapped(batch), examples or self._examples).detach()

    def _explain(
        self, first: Tensor, losses: Tensor, beside: Tensor, others: Tensor, number: int, drew: bool
    ) -> None:
        """Says why losses differ; a difference that rounding explains where the model itself is not
        reproducible is none.

        Args:
            first, losses: of the pass as it was, and of its last repetition. beside: with `others`
                exchanged, after both.
        """
        kept = ~others
        noise = max(_distance(first, losses), _distance(losses, self._again([]).losses))
        if 0 < noise <= self._tolerance:
            self._close(
                "the loss of an example", "beside other examples", losses[kept], beside[kept]
            )
            return
        if noise > 0:
            raise UnsupportedLayer(
                "the loss of an example",
                "another value when the same examples come again",
                "a forward pass that remembers nothing of earlier ones",
                "let the model write no state, and draw random numbers from torch's generator"
                " alone",
            )
        if drew and _same(
            losses[kept], self._with_exchanged(others, number, draws=False).losses[kept]
        ):
            raise UnsupportedLayer(
                "a random number in the forward pass",
                "one that several examples share",
                "draws of its own for each example (a mask a row)",
                "use a drop path a row (mode='row'), or set its probability to 0",
            )
        raise UnsupportedLayer(
            "the loss of an example",
            "another value beside other examples",
            "a function of that example alone",
            "let the model look at no other example: no batch statistics, no mixing, no capacity"
            " that examples share",
        )

    def _close(self, what: str, where: str, a: Tensor, b: Tensor) -> None:
        if _distance(a, b) > self._tolerance:
            raise UnsupportedLayer(
                what,
                f"{_distance(a, b):.1e} away from its value {where}",
                f"at most {self._tolerance:g}, relative",
                "let no loss depend on the number of examples or on their padding, and keep"
                " examples in the first dimension",
            )


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (torch.isnan(a) & torch.isnan(b))).all())


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest entry; where either is not finite both must be."""
    if not a.numel():
        return 0.0
    finite = torch.isfinite(a) & torch.isfinite(b)
    if not bool((torch.isfinite(a) == torch.isfinite(b)).all()):
        return float("inf")
    difference, scale = (a - b)[finite].double().abs(), a[finite].double().abs()
    return float(difference.max() / max(float(scale.max()), 1.0)) if difference.numel() else 0.0
