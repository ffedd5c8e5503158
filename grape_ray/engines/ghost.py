"""Ghost clipping: a first backward pass finds the norms and keeps nothing, a second one, of the weighted loss, makes the sum.

Sources: Li et al. 2022 (ghost clipping), Lee and Kifer 2021 (fast gradient clipping); per layer the cheaper of the Gram trick and a
gradient that lives for a moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grape_ray.engines.base import Engine, PerExampleLoss, check_losses
from grape_ray.engines.sink import sum_dtype
from grape_ray.engines.taped import Tape
from grape_ray.engines.tracked import tracking
from grape_ray.rules import pairs
from grape_ray.rules.pairs import Left
from grape_ray.subspace import Subspace
from grape_ray.types import ClippedSum


class TwoPasses(Tape):
    """Norms of a weight used once are taken on the spot; after `begin_sum` everything is summed on the spot."""

    def __init__(self, params: Mapping[str, nn.Parameter], rows: int, subspace: Subspace, period: int):
        super().__init__(params, rows, subspace, period)
        self._expected: Counter[str] = Counter()
        self._norms: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] | None = None
        self._bad = torch.empty(0, dtype=torch.int64)

    def announce(self, name: str) -> None:
        self._expected[name] += 1

    def pair(self, name: str, left: Left, right: Tensor) -> None:
        if self.sums is not None:
            self._sum(name, pairs.summed(*pairs.without(left, right, self._bad)))
        elif self._expected[name] == 1:
            self._norms[name] = self._squared(name, [(left, right)], None)
        else:
            super().pair(name, left, right)

    def dense(self, name: str, grads: Tensor) -> None:
        if self.sums is None:
            super().dense(name, grads)
        else:
            self._sum(name, grads.index_fill(0, self._bad, 0.0).sum(0))

    def squared_norms(self) -> dict[str, Tensor]:
        return {**self._norms, **super().squared_norms()}

    def begin_sum(self, bad: Tensor) -> None:
        """Forgets what the norms needed; from here on gradients arrive weighted, and rows `bad` count as zero."""
        self.uses.clear()
        self.small.clear()
        self.sums, self._bad = {}, bad

    def _sum(self, name: str, part: Tensor) -> None:
        assert self.sums is not None
        param = self.params[name]
        part = part.view(param.shape).to(sum_dtype(param))
        self.sums[name] = self.sums[name].add_(part) if name in self.sums else part


class Ghost(Engine):
    """Two backward passes and no per-example storage.

    Per-layer clipping weights an example differently in each layer, which one weighted loss cannot say: it takes the tape instead.
    """

    sink_type = TwoPasses

    def _pass(self, per_example_loss: PerExampleLoss, batch: Any, rows: int, step: int, mask: Tensor | None) -> ClippedSum:
        if self.clipping == "per_layer":
            self.sink_type = Tape
            return super()._pass(per_example_loss, batch, rows, step, mask)
        session = self._session(rows, step)
        sink = session.sink
        with tracking(self.model, self.params, session), torch.enable_grad():
            losses = check_losses(per_example_loss(self.model, batch), rows)
            if losses.requires_grad:
                losses.sum().backward(retain_graph=True)
            session.flush()
            weights, norms = self._factors(sink, losses, mask)
            sink.begin_sum((~torch.isfinite(norms)).nonzero().squeeze(1))
            if losses.requires_grad:
                weight = next(iter(weights.values())).to(losses.dtype)
                torch.autograd.backward(losses, weight)
            session.flush()
        return self._complete(sink.sums, {"norms": norms, "losses": losses.detach()})
