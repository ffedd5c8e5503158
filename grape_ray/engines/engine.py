"""The engine: per-example gradients of any model, clipped and summed; the model stays unwrapped."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from grape_ray.config.schema import Method, Privacy
from grape_ray.engines.capture.batches import Batch, count_examples, mapped
from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.dispatch import dispatch
from grape_ray.engines.capture.model_state import ModelSnapshot, awake, check_kinds
from grape_ray.engines.capture.parameter_swap import tracking
from grape_ray.engines.capture.random_state import random_states
from grape_ray.engines.collector import Collector, Materialised, sum_dtype
from grape_ray.engines.grouping import Groups, grouped
from grape_ray.engines.losses import PerExampleLoss, losses_of
from grape_ray.engines.norm_routes import parse_overrides
from grape_ray.engines.precision import pinned
from grape_ray.engines.rules.table import HANDLERS
from grape_ray.engines.subspace import Subspace, owned_parameters
from grape_ray.engines.verification.assumed import Assumed
from grape_ray.engines.verification.forward import Forward, Verifier
from grape_ray.engines.verification.verified import Layouts
from grape_ray.errors import ConfigError, UnsupportedLayer
from grape_ray.privacy.clipping import factors
from grape_ray.privacy.types import ClippedSum
from grape_ray.storage import Json


class Engine:
    """Turns (model, batch) into a ClippedSum; subclasses choose the collector, and how often
    to go backward.

    Args:
        model: any nn.Module; it stays the caller's object, unwrapped and unpatched between calls.
        clip_norm: bound C on an example's contribution. clipping: a policy of
            `grape_ray.privacy.clipping`.
        subspace: where weights are trained; the identity trains them in full.
        routes: (name pattern, route) pairs that overrule `norm_routes.norm_route`.

    Raises:
        UnsupportedLayer: a layer mixes examples (batch normalisation in training mode).
        ConfigError: nothing is trainable.
    """

    private = True
    estimates_norms = False  # whether its norms are estimates, which `sketch` routes ask for
    collector_type: type[Collector] = Materialised

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
        if not self.params:
            raise ConfigError(
                "model",
                "no trainable parameter",
                "at least one with requires_grad=True",
                "unfreeze what is to be trained",
            )
        check_kinds(model, self.params)
        self._verifier = Verifier(param.dtype for param in self.params.values())
        kind = nn.modules.batchnorm._BatchNorm
        self._batch_norms = [(n, m) for n, m in model.named_modules() if isinstance(m, kind)]
        self._check_batch_norms()

    def _check_batch_norms(self) -> None:
        """Refuses batch normalisation in training mode; asked again at each sum, because
        `model.train()` reaches frozen layers too.
        """
        for name, module in self._batch_norms:
            if module.training:
                raise UnsupportedLayer(
                    f"batch normalisation '{name}' in training mode",
                    None,
                    "no mixing of examples",
                    "use GroupNorm or call .eval() on it",
                )

    @classmethod
    def from_config(
        cls, model: nn.Module, privacy: Privacy, method: Method, subspace: Subspace
    ) -> Engine:
        """The engine that a run's config asks for."""
        return cls(
            model,
            clip_norm=privacy.clip_norm,
            clipping=privacy.clipping,
            subspace=subspace,
            routes=parse_overrides(method.routes, cls.estimates_norms),
            **cls.options(privacy, method),
        )

    @staticmethod
    def options(privacy: Privacy, method: Method) -> Json:
        """The arguments that this engine takes beside those of all, from a run's config."""
        return {}

    @property
    def estimated(self) -> tuple[int, bool] | None:
        """See `ClippedSum`."""
        return None

    @property
    def coordinates(self) -> int:
        """Numbers in a clipped sum: what is noised and exchanged a step."""
        # for its shapes alone
        collector = self.collector_type(self.params, 0, self.subspace, 0)
        return sum(math.prod(collector.shape(name)) for name in self.params)

    def take_shapes_alone(self) -> None:
        """From now on passes are over the meta device: nothing can be verified, and every tensor's
        rows are taken to be the examples', one after the other.
        """
        self._verifier = Assumed(param.dtype for param in self.params.values())

    def use_secret(self, key: bytes, rank: int = 0) -> None:
        """Takes this attempt's secret (32 bytes), for methods that draw secret numbers before the
        noise; the others need none.
        """

    def clipped_sum(
        self,
        per_example_loss: PerExampleLoss,
        batch: Batch,
        step: int = 0,
        mask: Tensor | None = None,
        groups: Tensor | None = None,
        units: int | None = None,
    ) -> ClippedSum:
        """Sum over the batch's examples of their clipped (projected) gradients; of units, where
        `groups` says whose the rows are, of the clipped averages of their rows' gradients.

        Args:
            per_example_loss: `(model, batch) -> (B,)`, each entry a function of its own example
                alone.
            batch: a tensor, or a dict, list or tuple of them; tensors that carry examples have B
                entries in dimension 0.
            step: the step to be taken: its projections are used, and its noise will be.
            mask: (B,) bool, or (units,); False ones are padding and contribute nothing.
            groups: (B,) int64, the unit of each row; None, where each row is an example of its own.
            units: their number; units without rows contribute zero.

        Guarantees: adding or removing one example, or one unit with all its rows, moves the sum by
        at most clip_norm in L2 over all tensors; an example, or a unit with a row, whose gradient
        is not finite contributes zero; an empty batch gives zeros without running the model.

        Raises:
            UnsupportedLayer: a trainable tensor's per-example gradient cannot be computed.
            ConfigError: the loss, the mask or the groups have another shape.
        """
        rows, device = count_examples(batch), next(iter(self.params.values())).device
        self._check_batch_norms()
        of_units = None if groups is None else Groups(groups, units, rows, device)
        examples = rows if of_units is None else of_units.units
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (examples,)):
            raise ConfigError(
                "mask",
                f"{mask.dtype} of shape {tuple(mask.shape)}",
                f"bool of shape ({examples},), one an example",
            )
        # frozen or unfrozen since: projections, noise and moments were made for another set
        if owned_parameters(self.model).keys() != self.params.keys():
            raise UnsupportedLayer(
                "the set of trainable parameters",
                "another than the engine was made for",
                "the same",
                "make a new engine",
            )
        if rows == 0:
            return self.empty_sum(step)
        states = random_states(device)

        def once() -> ClippedSum:
            return self._pass(per_example_loss, batch, step, mask, states, of_units)

        return self._verifier.attempts(once, states)

    def learn(self, per_example_loss: PerExampleLoss, batch: Batch) -> Layouts:
        """Verifies passes over one batch, with and without padded rows; `adopt` takes what was
        found to a sharded copy.

        Raises:
            UnsupportedLayer: as `clipped_sum`; or the batch says too little of which rows are
                whose, as one of two examples may.
        """
        examples = count_examples(batch)
        # Copies of one record are masked alike: a pass of another kind than one over records of
        # several lengths (`Layouts.signature`).
        last, first = (torch.full((max(examples, 2),), n) for n in (examples - 1, 0))
        picks = (torch.arange(examples), last, first)
        batches = [mapped(batch, lambda t, p=p: t[p.to(t.device)]) for p in picks]
        with awake(self.model):
            for some in batches:
                self.clipped_sum(per_example_loss, some)
            # What these batches leave open is refused now, not at the first step that is paid for.
            self._verifier.may_verify = False
            try:
                for some in batches:
                    self.clipped_sum(per_example_loss, some)
            finally:
                self._verifier.may_verify = True
        return self.layouts

    def adopt(self, layouts: Layouts) -> None:
        """Uses what was verified elsewhere, and never runs the model to verify more: ranks of a
        sharded model must run it together.
        """
        self.layouts, self._verifier.may_verify = layouts, False

    @property
    def layouts(self) -> Layouts:
        """Where the examples lie in the kinds of passes that were verified."""
        return self._verifier.layouts

    @layouts.setter
    def layouts(self, layouts: Layouts) -> None:
        self._verifier.layouts = layouts

    def empty_sum(self, step: int | None = None) -> ClippedSum:
        """The clipped sum of no example: zeros, to be noised like any other; with a step as
        `clipped_sum`, or of any.
        """
        # that no example came must not show: the noise is the same
        return self._complete({}, {}, step)

    def _pass(
        self,
        per_example_loss: PerExampleLoss,
        batch: Batch,
        step: int,
        mask: Tensor | None,
        states: list,
        groups: Groups | None,
    ) -> ClippedSum:
        """One pass; `states`: random states from before it."""
        snapshot, rows = ModelSnapshot(self.model), count_examples(batch)

        def new_collector() -> Collector:
            made = self._make_collector(rows if groups is None else groups.units, step)
            return made if groups is None else grouped(made, groups)

        forward, capture = self._watched(per_example_loss, batch, states, snapshot, new_collector)
        with tracking(self.model, self.params, capture, snapshot), torch.enable_grad():
            losses = self._verifier.losses(capture, forward)
            # the forward pass runs under the caller's autocast, norms and sums never do
            with pinned(capture.device.type):
                self._backward(capture, losses if groups is None else losses * groups.shares, mask)
        with pinned(capture.device.type), torch.no_grad():
            return self._finish(capture.collector.kept, losses, mask, step)

    def _watched(
        self,
        per_example_loss: PerExampleLoss,
        batch: Batch,
        states: list,
        snapshot: ModelSnapshot,
        new_collector: Callable[[], Collector],
    ) -> tuple[Forward, CapturePass]:
        """A forward pass that can be made again, and what watches it."""
        forward = Forward(
            run=lambda some, count: losses_of(per_example_loss, self.model, some, count),
            batch=batch,
            training=self.model.training,
            states=states,
            snapshot=snapshot,
            new_collector=new_collector,
        )
        capture = CapturePass(
            count_examples(batch),
            new_collector(),
            next(iter(self.params.values())).device,
            snapshot.constants(),
            self.layouts.inner_sites,
            functools.partial(dispatch, HANDLERS),
        )
        return forward, capture

    def _backward(self, capture: CapturePass, losses: Tensor, mask: Tensor | None) -> None:
        """Brings the gradients of the losses to the collector; subclasses may go back twice."""
        go_back(capture, losses)

    def _finish(
        self, collector: Collector, losses: Tensor, mask: Tensor | None, step: int
    ) -> ClippedSum:
        """The clipped sum, from what the collector holds: norms, factors, sum."""
        weights, norms = self._factors(collector, mask)
        sums = collector.weighted_sum(weights, not_finite(norms))
        return self._complete(sums, {"norms": norms, "losses": losses.detach()}, step)

    def _factors(
        self, collector: Collector, mask: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The clip factor (B,) of each tensor by name, and the examples' norms (B,) over all of
        them, both float64.
        """
        found = collector.squared_norms()
        device = next(iter(self.params.values())).device
        zeros = torch.zeros(collector.examples, dtype=torch.float64, device=device)
        complete = {name: found.get(name, zeros) for name in self.params}
        norms = torch.stack(list(complete.values())).sum(0).sqrt()
        return factors(complete, self.clipping, self.clip_norm, mask), norms

    def _complete(
        self, sums: dict[str, Tensor], unprotected: dict[str, Tensor], step: int | None
    ) -> ClippedSum:
        """The sum with zeros for every tensor that the batch left unused: it is noised all the
        same.
        """
        # for its shapes alone
        collector = self.collector_type(self.params, 0, self.subspace, 0)
        tensors = {
            name: (
                sums[name].to(sum_dtype(p))
                if name in sums
                else torch.zeros(collector.shape(name), dtype=sum_dtype(p), device=p.device)
            )
            for name, p in self.params.items()
        }
        period = self.subspace.period(step) if self.subspace.plan and step is not None else None
        return ClippedSum(
            tensors, self.clip_norm, unprotected, step, period, estimated=self.estimated
        )

    def _make_collector(self, examples: int, step: int) -> Collector:
        collector = self.collector_type(
            self.params, examples, self.subspace, self.subspace.period(step)
        )
        collector.overrides = self.routes
        return collector


def go_back(capture: CapturePass, losses: Tensor, retain_graph: bool = False) -> None:
    """Backward from the sum of the losses (B,), down to the gradients of computed values."""
    if losses.requires_grad:
        losses.sum().backward(retain_graph=retain_graph)
    capture.flush()


def not_finite(norms: Tensor) -> Tensor:
    """The indices of examples whose gradient is not finite; they count as zero."""
    return (~torch.isfinite(norms)).nonzero().squeeze(1)
