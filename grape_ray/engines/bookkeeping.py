"""Book-Keeping: one backward pass keeps (activation, output gradient) of every use; norms and the
weighted sum come from that tape.

Source: Bu et al. 2022, "Differentially Private Optimization on Large Model at Small Cost"
(BK-MixOpt).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from grape_ray.engines.algebra import factor_pairs
from grape_ray.engines.algebra.factor_pairs import Index, Left, Pair
from grape_ray.engines.algebra.rounding import squared
from grape_ray.engines.collector import Collector, sum_dtype
from grape_ray.engines.engine import Engine
from grape_ray.engines.norm_routes import norm_route, overridden
from grape_ray.engines.subspace import Subspace


class Tape(Collector):
    """Keeps pairs of factors of weights, and the per-example gradients of small tensors."""

    def __init__(
        self, params: Mapping[str, nn.Parameter], examples: int, subspace: Subspace, period: int
    ):
        super().__init__(params, examples, subspace, period)
        self.uses: dict[str, list[Pair]] = {}
        self.small: dict[str, Tensor] = {}

    def pair(self, name: str, left: Left, right: Tensor) -> None:
        self.uses.setdefault(name, []).append((left, right))

    def dense(self, name: str, grads: Tensor) -> None:
        grads = grads.to(sum_dtype(self.params[name]))
        self.small[name] = self.small[name] + grads if name in self.small else grads

    def squared_norms(self) -> dict[str, Tensor]:
        names = [*self.uses, *(n for n in self.small if n not in self.uses)]
        return {
            name: self._squared(
                name, factor_pairs.joined(self.uses.get(name, [])), self.small.get(name)
            )
            for name in names
        }

    def _squared(self, name: str, uses: list[Pair], small: Tensor | None) -> Tensor:
        """Squared norm (B,) of one tensor's gradient: all its uses, and what came as a per-example
        gradient, together.
        """
        if not uses:
            assert small is not None
            return squared(small)
        left, right = uses[0]
        route = overridden(name, self.overrides) or norm_route(
            factor_pairs.positions(uses), factor_pairs.width(left), right.shape[-1]
        )
        if small is None and len(uses) == 1 and isinstance(left, Index):
            return factor_pairs.lookup_squared_norms(*factor_pairs.wide(left, right))  # pyright: ignore[reportArgumentType]
        # a part that came as whole gradients is added to the others before any norm
        if small is None and route == "gram":
            return factor_pairs.gram_squared_norms(uses)
        return factor_pairs.outer_squared_norms(uses, small)

    def weighted_sum(self, factors: Mapping[str, Tensor], bad: Tensor) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for name in list(self.uses):
            for use in self.uses.pop(name):  # freed as soon as summed
                part = factor_pairs.summed(
                    *factor_pairs.scaled(*factor_pairs.without(*use, bad), factors[name])
                ).to(sum_dtype(self.params[name]))
                sums[name] = sums[name] + part if name in sums else part
            sums[name] = sums[name].view(self.params[name].shape)
        for name, grads in self.small.items():
            grads.index_fill_(0, bad, 0.0)
            part = (factors[name].to(grads.dtype) @ grads.reshape(self.examples, -1)).view(
                self.params[name].shape
            )
            sums[name] = sums[name] + part if name in sums else part
        return sums


class BookKeeping(Engine):
    """One backward pass, no weight gradient by autograd, exact norms."""

    collector_type = Tape
