"""Ghost clipping: a first backward pass finds the norms and keeps nothing, a second one makes the
sum.

Sources: Li et al. 2022 (ghost clipping), Lee and Kifer 2021 (fast gradient clipping); per layer the
cheaper of the Gram trick and a gradient that lives for a moment. There the second pass goes back
from the weighted loss; here it repeats the first, and factors are applied where gradients arrive. A
weighted loss rounds differently on its way back, in bf16 by enough to break the clip where large
gradients cancel, and it knows one factor an example, where per-layer clipping has one a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grape_ray.engines.algebra import factor_pairs
from grape_ray.engines.algebra.factor_pairs import Left
from grape_ray.engines.bookkeeping import Tape
from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.random_state import random_states, set_states
from grape_ray.engines.collector import Collector, sum_dtype
from grape_ray.engines.engine import Engine, go_back, not_finite
from grape_ray.engines.subspace import Subspace
from grape_ray.privacy.types import ClippedSum


class TwoPasses(Tape):
    """Norms of a weight used once are taken on the spot; after `begin_sum` everything is weighted
    and summed on the spot.
    """

    def __init__(
        self, params: Mapping[str, nn.Parameter], examples: int, subspace: Subspace, period: int
    ):
        super().__init__(params, examples, subspace, period)
        self._expected: Counter[str] = Counter()
        self._squares: dict[str, Tensor] = {}
        self._factors: Mapping[str, Tensor] | None = None
        self._bad = torch.empty(0, dtype=torch.int64)
        self.sums: dict[str, Tensor] = {}
        self.norms = torch.empty(0)

    def announce(self, name: str) -> None:
        self._expected[name] += 1

    def pair(self, name: str, left: Left, right: Tensor) -> None:
        if self._factors is not None:
            self._sum(
                name,
                factor_pairs.summed(
                    *factor_pairs.scaled(
                        *factor_pairs.without(left, right, self._bad), self._factors[name]
                    )
                ),
            )
        elif self._expected[name] == 1:
            # the only use there will be: its norm is known, and nothing is kept
            self._squares[name] = self._squared(name, [(left, right)], None)
        else:
            super().pair(name, left, right)

    def dense(self, name: str, grads: Tensor) -> None:
        if self._factors is None:
            super().dense(name, grads)
            return
        grads = grads.to(sum_dtype(self.params[name])).index_fill(0, self._bad, 0.0)
        self._sum(name, self._factors[name].to(grads.dtype) @ grads.reshape(self.examples, -1))

    def squared_norms(self) -> dict[str, Tensor]:
        return {**self._squares, **super().squared_norms()}

    def begin_sum(self, factors: Mapping[str, Tensor], bad: Tensor) -> None:
        """Forgets what the norms needed; from here on gradients are weighted as they arrive, and
        rows `bad` count as zero.
        """
        self.uses.clear()
        self.small.clear()
        self._factors, self._bad = factors, bad

    def _sum(self, name: str, part: Tensor) -> None:
        param = self.params[name]
        part = part.view(param.shape).to(sum_dtype(param))
        self.sums[name] = self.sums[name].add_(part) if name in self.sums else part


class Ghost(Engine):
    """Two backward passes and no per-example storage."""

    collector_type = TwoPasses

    def _backward(self, capture: CapturePass, losses: Tensor, mask: Tensor | None) -> None:
        collector = capture.collector.kept
        assert isinstance(collector, TwoPasses)
        states = random_states(capture.device)
        go_back(capture, losses, retain_graph=True)
        # where backward draws, as a recomputed dropout may, both passes draw the same
        set_states(states)
        weights, collector.norms = self._factors(collector, mask)
        collector.begin_sum(weights, not_finite(collector.norms))
        go_back(capture, losses)

    def _finish(
        self, collector: Collector, losses: Tensor, mask: Tensor | None, step: int
    ) -> ClippedSum:
        assert isinstance(collector, TwoPasses)
        unprotected = {"norms": collector.norms, "losses": losses.detach()}
        return self._complete(collector.sums, unprotected, step)
