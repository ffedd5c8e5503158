"""What an engine does with the gradients that backward finds, told by three verbs: pair, dense, and then norms and a weighted sum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grape_ray.rules.pairs import Left, outer, project, squared
from grape_ray.subspace import Subspace


class Sink:
    """Collects the per-example gradients of one micro-batch.

    Args:
        params: the trainable tensors by name. rows: examples B. subspace, period: where projected weights live.
    """

    overrides: tuple[tuple[str, str], ...] = ()

    def __init__(self, params: Mapping[str, nn.Parameter], rows: int, subspace: Subspace, period: int):
        self.params, self.rows, self.subspace, self.period = params, rows, subspace, period

    def input_matrix(self, name: str, axis: int, like: Tensor) -> Tensor | None:
        """The projection (I,R) of a weight whose inputs lie on `axis`, if it compresses that axis: then forward keeps x @ it."""
        plan = self.subspace.plan.get(name)
        if plan is None or plan.axis != axis:
            return None
        return self.subspace.matrix(name, self.period, self.params[name]).to(like.dtype)

    def announce(self, name: str) -> None:
        """Says in the forward pass that backward will bring gradients of `name` once more."""

    def pair(self, name: str, left: Left, right: Tensor) -> None:
        """One use of weight `name`: its per-example gradient is left^T right (rules.pairs)."""
        raise NotImplementedError

    def dense(self, name: str, grads: Tensor) -> None:
        """Per-example gradients (B, *param.shape) of a small tensor."""
        raise NotImplementedError

    def affine(self, name: str, bias: str, left: Tensor, right: Tensor) -> None:
        """One use of weight `name` together with the shift `bias` (O) of the same outputs."""
        self.dense(bias, left.sum(1))
        self.pair(name, left, right)

    def squared_norms(self) -> dict[str, Tensor]:
        """Per tensor the squared norm of each example's gradient, (B,) float64; unused tensors are left out."""
        raise NotImplementedError

    def weighted_sum(self, factors: Mapping[str, Tensor], bad: Tensor) -> dict[str, Tensor]:
        """Per tensor the sum over examples of factor * gradient; rows `bad` (indices) count as zero whatever they hold."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor's sum: its coordinates', or its own."""
        plan = self.subspace.plan.get(name)
        return plan.shape if plan else tuple(self.params[name].shape)


def sum_dtype(param: Tensor) -> torch.dtype:
    """The dtype in which sums are kept: fp64 for fp64 parameters, else fp32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


class Materialised(Sink):
    """Keeps every example's gradient, projected where the subspace says so: DP-GRAPE, or DP-SGD where it says nothing.

    A projected weight is projected first and contracted second, so (B, O, I) never exists: (B,T,R) then (B,R,I) or (B,R,O). The rank is
    the leading side in either case: that product reads the long output gradient row by row, and a column of ones beside the
    projected inputs gives the bias's gradient in the same reading.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], rows: int, subspace: Subspace, period: int):
        super().__init__(params, rows, subspace, period)
        self.stored: dict[str, Tensor] = {}

    def pair(self, name: str, left: Left, right: Tensor) -> None:
        plan = self.subspace.plan.get(name)
        if plan is None:
            self._add(name, outer(left, right).view(self.rows, *self.params[name].shape))
            return
        matrix = self.subspace.matrix(name, self.period, self.params[name])
        if plan.axis == 0:
            projected = project(left, matrix)
            self._add(name, outer(projected, right.to(projected.dtype)))
        elif isinstance(left, Tensor):
            self._add(name, outer(project(right, matrix), left))
        else:
            self._add(name, outer(left, project(right, matrix)).transpose(1, 2))

    def affine(self, name: str, bias: str, left: Tensor, right: Tensor) -> None:
        plan = self.subspace.plan.get(name)
        if plan is None or plan.axis == 0 or bias in self.subspace.plan:
            super().affine(name, bias, left, right)
            return
        projected = project(right, self.subspace.matrix(name, self.period, self.params[name]))
        both = outer(torch.cat([projected, projected.new_ones(*projected.shape[:2], 1)], 2), left)
        self._add(name, both[:, :-1])
        self._add(bias, both[:, -1])

    def dense(self, name: str, grads: Tensor) -> None:
        plan = self.subspace.plan.get(name)
        if plan is not None:
            matrix = self.subspace.matrix(name, self.period, self.params[name]).to(grads.dtype)
            flat = grads.reshape(self.rows, plan.rows, -1)
            grads = matrix.T @ (flat if plan.axis == 0 else flat.transpose(1, 2))
        self._add(name, grads)

    def _add(self, name: str, grads: Tensor) -> None:
        grads = grads.to(sum_dtype(self.params[name]))
        self.stored[name] = self.stored[name] + grads if name in self.stored else grads

    def squared_norms(self) -> dict[str, Tensor]:
        return {name: squared(stored) for name, stored in self.stored.items()}

    def weighted_sum(self, factors: Mapping[str, Tensor], bad: Tensor) -> dict[str, Tensor]:
        sums = {}
        for name in list(self.stored):
            stored = self.stored.pop(name)  # freed as soon as summed
            stored.index_fill_(0, bad, 0.0)
            total, plan = factors[name].to(stored.dtype) @ stored.reshape(self.rows, -1), self.subspace.plan.get(name)
            if plan is not None and plan.axis == 1:
                total = total.view(plan.rank, plan.other).T.contiguous()
            sums[name] = total.view(self.shape(name))
        return sums
