"""The engine: per-example gradients of any model, clipped and summed, without touching the model
object.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grape_ray.config.schema import Method, Privacy
from grape_ray.engines.capture import row_layout
from grape_ray.engines.capture.batches import batch_rows, is_ragged, mapped
from grape_ray.engines.capture.capture_pass import CapturePass, Phase, Reroute, Unsettled
from grape_ray.engines.capture.dispatch import dispatch
from grape_ray.engines.capture.model_state import Watch, awake, check_kinds
from grape_ray.engines.capture.random_state import random_states, set_states
from grape_ray.engines.capture.stand_ins import tracking
from grape_ray.engines.norm_routes import parse_overrides
from grape_ray.engines.precision import pinned
from grape_ray.engines.rules.table import HANDLERS
from grape_ray.engines.sink import Materialised, Sink, sum_dtype
from grape_ray.engines.subspace import Subspace, owned_parameters
from grape_ray.engines.verification.ownership import ownership
from grape_ray.engines.verification.repetition import Repetition
from grape_ray.engines.verification.verified import Layouts
from grape_ray.errors import ConfigError, UnsupportedLayer
from grape_ray.privacy.clipping import factors
from grape_ray.privacy.types import ClippedSum

_ATTEMPTS = 4  # of a pass: as its sizes suggest, as its gradients show, and once more for each
# passes of one kind between verifications, so that they cost less than a hundredth
VERIFY_EVERY = 256
# What rounding explains where two computations of one loss differ in their shapes, over the largest
# loss.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 0.1
PerExampleLoss = Callable[[nn.Module, Any], Tensor]


class Engine:
    """Turns (model, batch) into a ClippedSum; subclasses choose the sink and how often to go
    backward.

    Args:
        model: any nn.Module; it stays the caller's object, unwrapped and unpatched between calls.
        clip_norm: bound C on an example's contribution. clipping: a policy of
            `grape_ray.privacy.clipping`.
        subspace: where weights are trained; the identity trains them in full.
        routes: (name pattern, route) pairs that overrule `routing.norm_route`.

    Raises:
        UnsupportedLayer: a layer mixes examples (batch normalisation in training mode).
        ConfigError: nothing is trainable.
    """

    private = True
    sink_type: type[Sink] = Materialised

    def __init__(
        self,
        model: nn.Module,
        *,
        clip_norm: float,
        clipping: str = "flat",
        subspace: Subspace | None = None,
        routes: tuple[tuple[str, str], ...] = (),
    ):
        self.model, self.clip_norm, self.clipping, self.routes = model, clip_norm, clipping, routes
        self.subspace = subspace or Subspace()
        self.params = {name: param for name, (_, param) in owned_parameters(model).items()}
        self.layouts, self._may_verify, self._unsettled = Layouts(), True, False
        if not self.params:
            raise ConfigError(
                "model",
                "no trainable parameter",
                "at least one with requires_grad=True",
                "unfreeze what is to be trained",
            )
        check_kinds(model, self.params)
        self._norms = [
            (n, m)
            for n, m in model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        self._check_norms()

    def _check_norms(self) -> None:
        """Refuses batch normalisation in training mode; asked again at each sum, because
        `model.train()` reaches frozen layers too.
        """
        for name, module in self._norms:
            if module.training:
                raise UnsupportedLayer(
                    f"batch normalisation '{name}' in training mode",
                    None,
                    "no mixing of examples",
                    "use GroupNorm or call .eval() on it",
                )

    @staticmethod
    def common(
        privacy: Privacy, method: Method, subspace: Subspace, estimates: bool = False
    ) -> dict[str, Any]:
        """The arguments that every engine takes, from a run's config."""
        routes = parse_overrides(method.routes, estimates)
        return {
            "clip_norm": privacy.clip_norm,
            "clipping": privacy.clipping,
            "subspace": subspace,
            "routes": routes,
        }

    @classmethod
    def from_config(
        cls, model: nn.Module, privacy: Privacy, method: Method, subspace: Subspace
    ) -> Engine:
        """The engine that a run's config asks for."""
        return cls(model, **cls.common(privacy, method, subspace))

    @property
    def coordinates(self) -> int:
        """Numbers in a clipped sum: what is noised and exchanged a step."""
        sink = self.sink_type(self.params, 0, self.subspace, 0)
        return sum(math.prod(sink.shape(name)) for name in self.params)

    def use_secret(self, key: bytes, rank: int = 0) -> None:
        """Takes this attempt's secret (32 bytes), for methods that draw secret numbers before the
        noise; the others need none.
        """

    def clipped_sum(
        self,
        per_example_loss: PerExampleLoss,
        batch: Any,
        step: int = 0,
        mask: Tensor | None = None,
    ) -> ClippedSum:
        """Sum over the batch's examples of their clipped (projected) gradients.

        Args:
            per_example_loss: `(model, batch) -> (B,)`, each entry a function of its own example
                alone.
            batch: a tensor, or a dict, list or tuple of them; tensors that carry examples have B
                entries in dimension 0.
            step: the step to be taken: its projections are used, and its noise will be.
            mask: (B,) bool; False rows are padding and contribute nothing.

        Guarantees: adding or removing one example moves the sum by at most clip_norm in L2 over all
        tensors; an example whose gradient is not finite contributes zero; an empty batch gives
        zeros without running the model.

        Raises:
            UnsupportedLayer: a trainable tensor's per-example gradient cannot be had. ConfigError:
                the loss has another shape.
        """
        rows = batch_rows(batch)
        self._check_norms()
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (rows,)):
            raise ConfigError(
                "mask",
                f"{mask.dtype} of shape {tuple(mask.shape)}",
                f"bool of shape ({rows},), one an example",
            )
        if owned_parameters(self.model).keys() != self.params.keys():
            raise UnsupportedLayer(
                "the set of trainable parameters",
                "another than the engine was made for",
                "the same",
                "make a new engine",
            )
        if rows == 0:
            return self.empty_sum(step)
        state = random_states(next(iter(self.params.values())).device)
        self._unsettled = False
        for _ in range(_ATTEMPTS):
            try:
                return self._pass(per_example_loss, batch, rows, step, mask, state)
            except Reroute as found:
                self.layouts.inside |= found.ways
            except Unsettled as error:
                if not self._may_verify:
                    fix = "train without performance.sharded"
                    raise UnsupportedLayer(
                        "a use of a parameter",
                        "a first gradient",
                        "gradients that the start has seen",
                        fix,
                    ) from error
                self._unsettled = True
            set_states(state)
        raise UnsupportedLayer(
            "where shared values meet the batch",
            "another place in each pass",
            "a forward pass that is a function of shapes",
        )

    def learn(self, per_example_loss: PerExampleLoss, batch: Any) -> Layouts:
        """Verifies passes over one batch, with and without padded rows; `adopt` takes what was
        found to a sharded copy.

        Raises:
            UnsupportedLayer: as `clipped_sum`.
        """
        rows = batch_rows(batch)
        several = max(rows, 2)
        with awake(self.model):
            for picked in (
                torch.arange(rows),
                torch.full((several,), rows - 1),
                torch.zeros(several, dtype=torch.long),
            ):
                self.clipped_sum(
                    per_example_loss, mapped(batch, lambda t, p=picked: t[p.to(t.device)])
                )
        return self.layouts

    def adopt(self, layouts: Layouts) -> None:
        """Uses what was verified elsewhere, and never runs the model to verify more: ranks of a
        sharded model must run it together.
        """
        self.layouts, self._may_verify = layouts, False

    def empty_sum(self, step: int | None = None) -> ClippedSum:
        """The clipped sum of no example: zeros, to be noised like any other; with a step as
        `clipped_sum`, or of any.
        """
        return self._complete({}, {}, step)

    def _pass(
        self,
        per_example_loss: PerExampleLoss,
        batch: Any,
        rows: int,
        step: int,
        mask: Tensor | None,
        state: list,
    ) -> ClippedSum:
        """One pass; `state`: random states from before it."""
        watch = Watch(self.model)
        capture = self._new_pass(rows, step, watch)
        with tracking(self.model, self.params, capture, watch), torch.enable_grad():
            losses = self._forward(capture, per_example_loss, batch, step, watch, state)
            with pinned(capture.device.type):
                if losses.requires_grad:
                    losses.sum().backward()
                capture.flush()
        with pinned(capture.device.type):
            return self._clip(capture.sink, losses, mask, step)

    def _forward(
        self,
        capture: CapturePass,
        per_example_loss: PerExampleLoss,
        batch: Any,
        step: int,
        watch: Watch,
        state: list,
    ) -> Tensor:
        """The losses (B,) of a pass whose taps all know whose rows they have: by an earlier pass of
        its kind, or verified now.
        """

        def forward(other: Any, rows: int) -> Tensor:
            with _uncompiled():
                return check_losses(per_example_loss(self.model, other), rows)

        losses = self._once(capture, forward, batch)
        signature = self.layouts.signature(capture, self.model.training, is_ragged(batch))
        for tap in capture.taps if capture.rows == 1 else ():  # all of it is the one example's
            tap.layout = next(row_layout.candidates(tap.lead, 1))
        fitted = self.layouts.fitted(signature, capture)
        if not fitted and not self._may_verify and capture.rows > 1:
            fix = "train without performance.sharded, or make the model's path a function of shapes"
            raise UnsupportedLayer(
                "a pass that uses parameters as no verified one has",
                None,
                "passes of the kinds that the start verified",
                fix,
            )
        passed = self.layouts.passes.get(signature, 0)
        if self._may_verify and (not fitted or self._unsettled or passed % VERIFY_EVERY == 0):
            thorough = not fitted or self._unsettled
            for tap in capture.taps if thorough and capture.rows > 1 else ():
                tap.layout = None
            held = [losses]
            del losses  # what holds them holds the graph, and the pass is made again
            losses = self._verified(capture, forward, batch, held, state, watch, thorough, step)
            self.layouts.remember(signature, capture)
        elif self._may_verify and capture.dependence.exported and capture.rows > 1:
            # what it did next may follow what they said
            ownership(capture, losses, self._tolerance(capture), thorough=True)
        self.layouts.passes[signature] = passed + 1
        capture.phase = Phase.BACKWARD
        return losses

    @staticmethod
    def _once(capture: CapturePass, forward: Callable[[Any, int], Tensor], batch: Any) -> Tensor:
        """One forward pass under the capture's watch, on containers of its own."""
        try:
            return capture.dependence.over(forward, batch)
        except RuntimeError as error:
            if "functorch" not in str(error) and "NestedTensor" not in str(error):
                raise
            raise UnsupportedLayer(
                "a use of the model under torch.func or in nested tensors",
                str(error).splitlines()[0],
                "plain calls",
                "call it as it is",
            ) from error

    def _verified(
        self,
        capture: CapturePass,
        forward: Callable[[Any, int], Tensor],
        batch: Any,
        held: list[Tensor],
        state: list,
        watch: Watch,
        thorough: bool,
        step: int,
    ) -> Tensor:
        """Verifies a pass (engines.ownership, engines.repetition) and makes it again, so that no
        two graphs are held at once.

        Args:
            held: the losses of the pass, which are taken out of it.

        Raises:
            UnsupportedLayer: it mixes examples, remembers, or shares luck.
        """
        tolerance, seen, taps = self._tolerance(capture), capture.dependence, capture.taps
        losses = held.pop()
        look = losses.detach(), taps, ownership(capture, losses, tolerance, thorough)
        del losses
        Repetition(capture, forward, batch, state, tolerance).check(look, watch, seen, thorough)
        after = random_states(capture.device)
        set_states(state)
        capture.restart(self._make_sink(capture.rows, step))
        losses = self._once(capture, forward, batch)
        set_states(after)
        if [tap.key for tap in capture.taps] != [tap.key for tap in taps]:
            raise UnsupportedLayer(
                "the uses of parameters in a pass",
                "others when the same examples come again",
                "a forward pass that repeats",
                "seed it",
            )
        for tap, known in zip(capture.taps, taps):
            tap.layout, tap.settled = known.layout, known.settled
        return losses

    def _tolerance(self, capture: CapturePass) -> float:
        """What rounding explains where two computations of one number differ in their shapes,
        relative to the largest.
        """
        return (
            _HALF_TOLERANCE
            if capture.half
            else max(_TOLERANCE.get(p.dtype, _HALF_TOLERANCE) for p in self.params.values())
        )

    @torch.no_grad()
    def _clip(self, sink: Sink, losses: Tensor, mask: Tensor | None, step: int) -> ClippedSum:
        """Norms, factors, sum."""
        weights, norms = self._factors(sink, losses, mask)
        bad = (~torch.isfinite(norms)).nonzero().squeeze(1)
        sums = sink.weighted_sum(weights, bad)
        return self._complete(sums, {"norms": norms, "losses": losses.detach()}, step)

    def _factors(
        self, sink: Sink, losses: Tensor, mask: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        found = sink.squared_norms()
        zeros = torch.zeros(losses.shape[0], dtype=torch.float64, device=losses.device)
        complete = {name: found.get(name, zeros) for name in self.params}
        norms = torch.stack(list(complete.values())).sum(0).sqrt()
        return factors(complete, self.clipping, self.clip_norm, mask), norms

    def _complete(
        self, sums: dict[str, Tensor], unprotected: dict[str, Tensor], step: int | None
    ) -> ClippedSum:
        """The sum with zeros for every tensor that the batch left unused: it is noised all the
        same.
        """
        sink = self.sink_type(self.params, 0, self.subspace, 0)
        tensors = {
            name: (
                sums[name].to(sum_dtype(p))
                if name in sums
                else torch.zeros(sink.shape(name), dtype=sum_dtype(p), device=p.device)
            )
            for name, p in self.params.items()
        }
        period = self.subspace.period(step) if self.subspace.plan and step is not None else None
        return ClippedSum(tensors, self.clip_norm, unprotected, step, period)

    def _new_pass(self, rows: int, step: int, watch: Watch) -> CapturePass:
        return CapturePass(
            rows,
            self._make_sink(rows, step),
            next(iter(self.params.values())).device,
            watch.constants(),
            self.layouts.inside,
            functools.partial(dispatch, HANDLERS),
        )

    def _make_sink(self, rows: int, step: int) -> Sink:
        sink = self.sink_type(self.params, rows, self.subspace, self.subspace.period(step))
        sink.overrides = self.routes
        return sink


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """What torch.compile has compiled runs as it was written: a compiled graph would show no use of
    a parameter.
    """
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def check_losses(losses: Any, rows: int) -> Tensor:
    """The losses, if they are one an example."""
    if not isinstance(losses, Tensor) or losses.shape != (rows,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigError(
            "per_example_loss",
            got,
            f"a tensor of shape ({rows},), one loss an example",
            "reduce over tokens, not over examples",
        )
    return losses
