"""What an engine does with the per-example gradients that backward finds: it collects them, gives
their norms, and then a weighted sum.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grape_ray.engines.algebra import factor_pairs
from grape_ray.engines.algebra.factor_pairs import Index, Left, outer
from grape_ray.engines.algebra.rounding import squared
from grape_ray.engines.subspace import Subspace


class Collector:
    """Collects the per-example gradients of one micro-batch.

    Args:
        params: the trainable tensors by name. examples: their number B. subspace, period: where
            projected weights live.
    """

    overrides: tuple[tuple[str, str], ...] = ()

    def __init__(
        self, params: Mapping[str, nn.Parameter], examples: int, subspace: Subspace, period: int
    ):
        self.params, self.examples, self.subspace, self.period = params, examples, subspace, period

    @property
    def kept(self) -> Collector:
        """The collector that keeps what arrives: this one, or the one that it hands it to."""
        return self

    def compresses(self, name: str, axis: int) -> bool:
        """Whether weight `name` is compressed on `axis`."""
        plan = self.subspace.plan.get(name)
        return plan is not None and plan.axis == axis

    def matrix(self, name: str, like: Tensor) -> Tensor:
        """The projection (side, R) of weight `name` in this period, in the dtype of `like`."""
        return self.subspace.matrix(name, self.period, self.params[name]).to(like.dtype)

    def announce(self, name: str) -> None:
        """Says in the forward pass that backward will bring gradients of `name` once more."""

    def pair(self, name: str, left: Left, right: Tensor) -> None:
        """One use of weight `name`: its per-example gradient is left^T right (`factor_pairs`)."""
        raise NotImplementedError

    def dense(self, name: str, grads: Tensor) -> None:
        """Per-example gradients (B, *param.shape) of a small tensor."""
        raise NotImplementedError

    def affine(self, name: str, bias: str, left: Tensor, right: Tensor) -> None:
        """One use of weight `name` together with the shift `bias` (O) of the same outputs."""
        self.dense(bias, left.sum(1))
        self.pair(name, left, right)

    def squared_norms(self) -> dict[str, Tensor]:
        """Per tensor the squared norm of each example's gradient, (B,) float64; unused tensors are
        left out.
        """
        raise NotImplementedError

    def weighted_sum(self, factors: Mapping[str, Tensor], bad: Tensor) -> dict[str, Tensor]:
        """Per tensor the sum over examples of factor * gradient; rows `bad` (indices) count as zero
        whatever they hold.
        """
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor's sum: its coordinates', or its own."""
        plan = self.subspace.plan.get(name)
        return plan.shape if plan else tuple(self.params[name].shape)


def sum_dtype(param: Tensor) -> torch.dtype:
    """The dtype in which sums are kept: fp64 for fp64 parameters, else fp32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


class Materialised(Collector):
    """Keeps every example's gradient, projected where the subspace says so: DP-GRAPE, or DP-SGD
    where it says nothing.

    A projected weight is projected first and contracted second, so (B, O, I) never exists: (B,T,R)
    then (B,R,I) or (B,R,O). The rank is the leading side in either case: that product reads the
    long output gradient row by row, and a column of ones beside the projected inputs gives the
    bias's gradient in the same reading. A table that is looked up once is kept as its look-ups: in
    full, it would be (B, vocabulary, width) of zeros.
    """

    def __init__(
        self, params: Mapping[str, nn.Parameter], examples: int, subspace: Subspace, period: int
    ):
        super().__init__(params, examples, subspace, period)
        self.stored: dict[str, Tensor] = {}
        self.lookups: dict[str, tuple[Index, Tensor]] = {}

    def pair(self, name: str, left: Left, right: Tensor) -> None:
        plan = self.subspace.plan.get(name)
        if plan is None:
            # until a second use comes (`_add`)
            if isinstance(left, Index) and name not in self.stored and name not in self.lookups:
                self.lookups[name] = (left, factor_pairs.wide(left, right)[1])
            else:
                self.add(name, outer(left, right).view(self.examples, *self.params[name].shape))
        elif plan.axis == 0:
            projected = self._project(name, left)
            self.add(name, outer(projected, right.to(projected.dtype)))
        elif isinstance(left, Tensor):
            self.add(name, outer(self._project(name, right), left))
        else:
            self.add(name, outer(left, self._project(name, right)).transpose(1, 2))

    def affine(self, name: str, bias: str, left: Tensor, right: Tensor) -> None:
        if not self.compresses(name, 1) or bias in self.subspace.plan:
            super().affine(name, bias, left, right)
            return
        projected = self._project(name, right)
        both = outer(torch.cat([projected, projected.new_ones(*projected.shape[:2], 1)], 2), left)
        self.add(name, both[:, :-1])
        self.add(bias, both[:, -1])

    def dense(self, name: str, grads: Tensor) -> None:
        plan = self.subspace.plan.get(name)
        if plan is not None:
            flat = grads.reshape(self.examples, plan.rows, -1)
            grads = self.matrix(name, grads).T @ (flat if plan.axis == 0 else flat.transpose(1, 2))
        self.add(name, grads)

    def _project(self, name: str, factor: Left) -> Tensor:
        """(B,T,R) of a factor on the compressed side, which forward may have projected already."""
        plan = self.subspace.plan[name]
        if isinstance(factor, Index):
            return factor.project(self.subspace.matrix(name, self.period, self.params[name]))
        return factor if factor.shape[-1] == plan.rank else factor @ self.matrix(name, factor)

    def add(self, name: str, grads: Tensor) -> None:
        """Adds per-example gradients (B,...) of a use, in coordinates where the weight has some."""
        # a second use of a table, as of a tied head: now it needs its full gradient
        if name in self.lookups:
            grads = grads + outer(*self.lookups.pop(name)).view(grads.shape)
        grads = grads.to(sum_dtype(self.params[name]))
        self.stored[name] = self.stored[name] + grads if name in self.stored else grads

    def squared_norms(self) -> dict[str, Tensor]:
        found = {name: squared(stored) for name, stored in self.stored.items()}
        return found | {
            name: factor_pairs.lookup_squared_norms(*use) for name, use in self.lookups.items()
        }

    def weighted_sum(self, factors: Mapping[str, Tensor], bad: Tensor) -> dict[str, Tensor]:
        sums = {}
        for name in list(self.stored):
            stored = self.stored.pop(name)  # freed as soon as summed
            stored.index_fill_(0, bad, 0.0)
            total, plan = (
                factors[name].to(stored.dtype) @ stored.reshape(self.examples, -1),
                self.subspace.plan.get(name),
            )
            if plan is not None and plan.axis == 1:
                total = total.view(plan.rank, plan.other).T.contiguous()
            sums[name] = total.view(self.shape(name))
        for name, use in self.lookups.items():
            sums[name] = factor_pairs.summed(
                *factor_pairs.scaled(*factor_pairs.without(*use, bad), factors[name])
            ).view(self.shape(name))
        return sums
