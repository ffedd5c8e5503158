"""Forward passes of which it is known, by verification, which rows belong to which example."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from grape_ray.engines.capture import row_layout
from grape_ray.engines.capture.batches import Batch, is_ragged
from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.model_state import ModelSnapshot
from grape_ray.engines.capture.random_state import random_states, set_states
from grape_ray.engines.capture.tap import Phase, RetryPass, UnverifiedUse
from grape_ray.engines.collector import Collector
from grape_ray.engines.verification.ownership import ownership
from grape_ray.engines.verification.repetition import Observation, Repetition
from grape_ray.engines.verification.verified import Layouts
from grape_ray.errors import UnsupportedLayer

# passes of one kind between verifications, so that they cost less than a hundredth
VERIFY_EVERY = 256
_ATTEMPTS = 4  # of a pass: as its sizes suggest, as its gradients show, and once more for each
# What rounding explains where two computations of one loss differ in their shapes, over the largest
# loss.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 0.1
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Forward:
    """A forward pass that can be made again.

    Attributes:
        run: (batch, B) -> losses (B,). training: the model's mode.
        states: random states from before the pass. snapshot: the model from before it.
        new_collector: makes an empty collector.
    """

    run: Callable[[Batch, int], Tensor]
    batch: Batch
    training: bool
    states: list
    snapshot: ModelSnapshot
    new_collector: Callable[[], Collector]

    def losses(self, capture: CapturePass) -> Tensor:
        """The losses (B,), from containers of the pass's own."""
        try:
            return capture.dependence.over(self.run, self.batch)
        except RuntimeError as error:
            # torch has no class for these: its text alone tells
            if "functorch" not in str(error) and "NestedTensor" not in str(error):
                raise
            raise UnsupportedLayer(
                "a use of the model under torch.func or in nested tensors",
                str(error).splitlines()[0],
                "plain calls",
                "call it as it is",
            ) from error


class Verifier:
    """Decides for each pass whether an earlier one shows where its examples lie, and verifies it
    where none does, and every `VERIFY_EVERY`th time.

    Attributes:
        layouts: what was verified so far.
        may_verify: whether the model may be run to verify more; ranks of a sharded model must run
            it together, so that none may do so alone.

    Args:
        dtypes: of the parameters. share: of what rounding explains at most, the part that may be.
    """

    def __init__(self, dtypes: Iterable[torch.dtype], share: float = 1.0):
        self.layouts, self.may_verify = Layouts(), True
        self._tolerance = share * max(_TOLERANCE.get(dtype, _HALF_TOLERANCE) for dtype in dtypes)
        self._found_unverified = False

    def attempts(self, once: Callable[[], _Result], states: list) -> _Result:
        """The result of `once`, a whole pass, made again where it shows that the batch lies
        elsewhere than was assumed.

        Args:
            states: random states from before the pass.
        """
        self._found_unverified = False
        for _ in range(_ATTEMPTS):
            try:
                return once()
            except RetryPass as found:
                self.layouts.inner_sites |= found.sites
            except UnverifiedUse as error:
                if not self.may_verify:
                    raise UnsupportedLayer(
                        "a use of a parameter",
                        "a first gradient",
                        "gradients that the start has seen",
                        "train without performance.sharded",
                    ) from error
                self._found_unverified = True
            set_states(states)
        raise UnsupportedLayer(
            "where shared values meet the batch",
            "another place in each pass",
            "a forward pass that is a function of shapes",
        )

    def losses(self, capture: CapturePass, forward: Forward) -> Tensor:
        """The losses (B,) of a pass whose taps all know whose rows they have: by an earlier pass of
        its kind, or verified now.

        Raises:
            UnsupportedLayer: it mixes examples, remembers earlier ones, or shares random numbers
                among them; or it may not be verified.
        """
        # a list, so that `_verify` can let go of its graph before the next is built
        held = [forward.losses(capture)]
        several = capture.examples > 1
        signature = self.layouts.signature(capture, forward.training, is_ragged(forward.batch))
        for tap in () if several else capture.taps:  # all of it is the one example's
            tap.layout = next(row_layout.candidates(tap.lead, 1))
        fitted = self.layouts.fitted(signature, capture)
        if not fitted and not self.may_verify and several:
            raise UnsupportedLayer(
                "a pass that uses parameters as no verified one has",
                None,
                "passes of the kinds that the start verified",
                "train without performance.sharded, or make the model's path a function of shapes",
            )
        passed = self.layouts.passes.get(signature, 0)
        thorough = not fitted or self._found_unverified
        if self.may_verify and (thorough or passed % VERIFY_EVERY == 0):
            # the evidence of this pass decides, not what another one showed
            for tap in capture.taps if thorough and several else ():
                tap.layout = None
            self._verify(capture, forward, held, thorough)
            self.layouts.remember(signature, capture)
        elif self.may_verify and capture.dependence.exported and several:
            # numbers of the batch have left torch: what followed may depend on what they say
            if held[0].requires_grad:
                ownership(capture, held[0], self._tolerance_of(capture), thorough=True)
            else:  # no gradient can tell
                self._verify(capture, forward, held, thorough=True)
        self.layouts.passes[signature] = passed + 1
        capture.phase = Phase.BACKWARD
        return held.pop()

    def _verify(
        self, capture: CapturePass, forward: Forward, held: list[Tensor], thorough: bool
    ) -> None:
        """Verifies a pass and makes it again, so that no two graphs are held at once.

        Args:
            held: the losses of the pass, which hold its graph; those of the new pass afterwards.
        """
        tolerance, dependence, taps = (
            self._tolerance_of(capture),
            capture.dependence,
            capture.taps,
        )
        losses = held.pop()
        sums = ownership(capture, losses, tolerance, thorough)
        observed = Observation(losses.detach(), taps, sums)
        del losses
        repetition = Repetition(capture, forward.run, forward.batch, forward.states, tolerance)
        repetition.check(observed, forward.snapshot, dependence, thorough)
        # the run's generators go on as if there had been one pass
        after = random_states(capture.device)
        set_states(forward.states)
        capture.restart(forward.new_collector())
        held.append(forward.losses(capture))
        set_states(after)
        if [tap.key for tap in capture.taps] != [tap.key for tap in taps]:
            raise UnsupportedLayer(
                "the uses of parameters in a pass",
                "others when the same examples come again",
                "a forward pass that repeats",
                "seed it",
            )
        for tap, known in zip(capture.taps, taps):
            tap.layout, tap.unambiguous = known.layout, known.unambiguous

    def _tolerance_of(self, capture: CapturePass) -> float:
        """What rounding explains where two computations of one number differ in their shapes,
        relative to the largest.
        """
        return _HALF_TOLERANCE if capture.half else self._tolerance
