"""The engine: per-example gradients of any model, clipped and summed, without touching the model object."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from grape_ray.clipping import factors
from grape_ray.config import Method, Privacy
from grape_ray.engines.layout import Layouts, UnseenUse
from grape_ray.engines.routing import parse_overrides
from grape_ray.engines.sink import Materialised, Sink, sum_dtype
from grape_ray.engines.tracked import Session, tracking
from grape_ray.errors import ConfigError, UnsupportedLayer
from grape_ray.subspace import Subspace, owned_parameters
from grape_ray.types import ClippedSum

_CONTENT_ROWS = 4  # examples compared with each other, and with rewordings of themselves, when a model is first seen
# One row of a tensor as it is, or with its first or last entry everywhere, so that a choice of tokens by value chooses otherwise.
_WAYS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda row: row,
    lambda row: row[:, :1].expand_as(row) if row.ndim > 1 else row,
    lambda row: row[:, -1:].expand_as(row) if row.ndim > 1 else row,
)
_FAILURES = (RuntimeError, ValueError, IndexError)
PerExampleLoss = Callable[[nn.Module, Any], Tensor]


class Engine:
    """Turns (model, batch) into a ClippedSum; subclasses choose the sink and how often to go backward.

    Args:
        model: any nn.Module; it stays the caller's object, unwrapped and unpatched between calls.
        clip_norm: bound C on an example's contribution. clipping: a policy of `grape_ray.clipping`.
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
        self.layouts, self._may_probe = Layouts(), True
        if not self.params:
            raise ConfigError("model", "no trainable parameter", "at least one with requires_grad=True")
        self._norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._check_norms()

    def _check_norms(self) -> None:
        """Refuses batch normalisation in training mode; asked again at each sum, because `model.train()` reaches frozen layers too."""
        for name, module in self._norms:
            if module.training:
                raise UnsupportedLayer(
                    f"batch normalisation '{name}' in training mode", None, "no mixing of examples", "use GroupNorm or call .eval() on it"
                )

    @staticmethod
    def common(privacy: Privacy, method: Method, subspace: Subspace, estimates: bool = False) -> dict[str, Any]:
        """The arguments that every engine takes, from a run's config."""
        routes = parse_overrides(method.routes, estimates)
        return {"clip_norm": privacy.clip_norm, "clipping": privacy.clipping, "subspace": subspace, "routes": routes}

    @classmethod
    def from_config(cls, model: nn.Module, privacy: Privacy, method: Method, subspace: Subspace) -> Engine:
        """The engine that a run's config asks for."""
        return cls(model, **cls.common(privacy, method, subspace))

    @property
    def coordinates(self) -> int:
        """Numbers in a clipped sum: what is noised and exchanged a step."""
        sink = self.sink_type(self.params, 0, self.subspace, 0)
        return sum(math.prod(sink.shape(name)) for name in self.params)

    def use_secret(self, key: bytes, rank: int = 0) -> None:
        """Takes this attempt's secret (32 bytes), for methods that draw secret numbers before the noise; the others need none."""

    def clipped_sum(self, per_example_loss: PerExampleLoss, batch: Any, step: int = 0, mask: Tensor | None = None) -> ClippedSum:
        """Sum over the batch's examples of their clipped (projected) gradients.

        Args:
            per_example_loss: `(model, batch) -> (B,)`, each entry a function of its own example alone.
            batch: a tensor, or a dict, list or tuple of them; tensors that carry examples have B entries in dimension 0.
            step: decides the projection's period. mask: (B,) bool; False rows are padding and contribute nothing.

        Guarantees: adding or removing one example moves the sum by at most clip_norm in L2 over all tensors; an example whose
        gradient is not finite contributes zero; an empty batch gives zeros without running the model.

        Raises:
            UnsupportedLayer: a trainable tensor's per-example gradient cannot be had. ConfigError: the loss has another shape.
        """
        rows = batch_rows(batch)
        self._check_norms()
        if rows == 0:
            return self.empty_sum()
        # A model may take another path when no row is padded, so a second probe takes copies of every row.
        for seen_rows in (1, rows):
            try:
                return self._pass(per_example_loss, batch, rows, step, mask)
            except UnseenUse as unseen:
                if not self._may_probe:
                    fix = "train without performance.sharded, or make the model's path a function of shapes"
                    raise UnsupportedLayer(f"a use of {unseen.args[0][0]} that no trial has met", unseen.args[0][1], "", fix) from unseen
                self._probe(per_example_loss, batch, step, seen_rows)
        return self._pass(per_example_loss, batch, rows, step, mask)

    def learn(self, per_example_loss: PerExampleLoss, batch: Any) -> Layouts:
        """Learns how the model uses its parameters from one batch, with and without padded rows; `adopt` takes it to a sharded copy."""
        for seen_rows in dict.fromkeys((1, batch_rows(batch))):
            self._probe(per_example_loss, batch, 0, seen_rows)
        return self.layouts

    def adopt(self, layouts: Layouts) -> None:
        """Uses what was learned elsewhere, and never runs the model to learn more: ranks of a sharded model must run it together."""
        self.layouts, self._may_probe = layouts, False

    def empty_sum(self) -> ClippedSum:
        """The clipped sum of no example: zeros, to be noised like any other."""
        return self._complete({}, {})

    def _pass(self, per_example_loss: PerExampleLoss, batch: Any, rows: int, step: int, mask: Tensor | None) -> ClippedSum:
        session = self._session(rows, step)
        with tracking(self.model, self.params, session), torch.enable_grad():
            losses = check_losses(per_example_loss(self.model, batch), rows)
            if losses.requires_grad:
                losses.sum().backward()
            session.flush()
        return self._clip(session.sink, losses, mask)

    @torch.no_grad()
    def _clip(self, sink: Sink, losses: Tensor, mask: Tensor | None) -> ClippedSum:
        """Norms, factors, sum."""
        weights, norms = self._factors(sink, losses, mask)
        bad = (~torch.isfinite(norms)).nonzero().squeeze(1)
        sums = sink.weighted_sum(weights, bad)
        return self._complete(sums, {"norms": norms, "losses": losses.detach()})

    def _factors(self, sink: Sink, losses: Tensor, mask: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        found = sink.squared_norms()
        zeros = torch.zeros(losses.shape[0], dtype=torch.float64, device=losses.device)
        complete = {name: found.get(name, zeros) for name in self.params}
        norms = torch.stack(list(complete.values())).sum(0).sqrt()
        return factors(complete, self.clipping, self.clip_norm, mask), norms

    def _complete(self, sums: dict[str, Tensor], unprotected: dict[str, Tensor]) -> ClippedSum:
        """The sum with zeros for every tensor that the batch left unused: it is noised all the same."""
        sink = self.sink_type(self.params, 0, self.subspace, 0)
        tensors = {
            name: sums[name].to(sum_dtype(p)) if name in sums else torch.zeros(sink.shape(name), dtype=sum_dtype(p), device=p.device)
            for name, p in self.params.items()
        }
        return ClippedSum(tensors, self.clip_norm, unprotected)

    def _session(self, rows: int, step: int) -> Session:
        return Session(rows, self.layouts, self._make_sink(rows, step), next(iter(self.params.values())).device)

    def _make_sink(self, rows: int, step: int) -> Sink:
        sink = self.sink_type(self.params, rows, self.subspace, self.subspace.period(step))
        sink.overrides = self.routes
        return sink

    def _probe(self, per_example_loss: PerExampleLoss, batch: Any, step: int, seen_rows: int) -> None:
        """Learns which uses carry the batch, on copies of its first `seen_rows` examples; consumes no random state."""
        rows = batch_rows(batch)
        devices = [next(iter(self.params.values())).device.index or 0] if torch.cuda.is_available() else []

        def run(pick: Callable[[Tensor], Tensor], count: int) -> None:
            picked = tree_map(lambda t: pick(t) if carries(t, rows) else t, batch)
            with tracking(self.model, self.params, self._session(count, step)), torch.no_grad():
                per_example_loss(self.model, picked)

        with torch.random.fork_rng(devices):
            self.layouts.probe(lambda times: run(lambda t: torch.cat([t[:seen_rows]] * times), times * seen_rows))

            def reworded(index: int) -> None:
                row, way = divmod(index, len(_WAYS))
                with contextlib.suppress(*(_FAILURES if way else ())):  # a model may fail on nonsense
                    run(lambda t: _WAYS[way](t[row : row + 1]), 1)

            self.layouts.check_contents(reworded, len(_WAYS) * min(rows, _CONTENT_ROWS))


def batch_rows(batch: Any) -> int:
    """Examples in a batch: the length of its first tensor."""
    tensors = [t for t in tree_flatten(_plain_dict(batch))[0] if isinstance(t, Tensor) and t.ndim]
    if not tensors:
        raise ConfigError("batch", type(batch).__name__, "a tensor, or a dict, list or tuple of tensors with examples in dimension 0")
    return tensors[0].shape[0]


def carries(leaf: Any, rows: int) -> bool:
    """Whether a leaf of the batch has one entry an example."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows


def _plain_dict(batch: Any) -> Any:
    return dict(batch) if hasattr(batch, "keys") else batch


def check_losses(losses: Any, rows: int) -> Tensor:
    """The losses, if they are one an example."""
    if not isinstance(losses, Tensor) or losses.shape != (rows,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigError(
            "per_example_loss", got, f"a tensor of shape ({rows},), one loss an example", "reduce over tokens, not over examples"
        )
    return losses
