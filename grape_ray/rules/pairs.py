"""A weight's per-example gradient as a pair of factors: left (B,T,O) and right (B,T,I) stand for left^T right, (B,O,I), never formed early.

Shapes: B examples, T positions, O and I the weight's two sides, R rank, U uses of one weight. Left may be an `Index`: one-hot rows
of an embedding table, kept as ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Index:
    """One-hot factors (B,T,size), held as ids (B,T)."""

    ids: Tensor
    size: int

    def project(self, matrix: Tensor) -> Tensor:
        """one-hot @ matrix (size,R) -> (B,T,R), a row look-up."""
        return matrix[self.ids]

    def outer(self, right: Tensor) -> Tensor:
        """one-hot^T right -> (B,size,I), by index_add."""
        rows, _, width = right.shape
        out = right.new_zeros(rows * self.size, width)
        flat = self.ids + torch.arange(rows, device=self.ids.device).unsqueeze(1) * self.size
        return out.index_add_(0, flat.reshape(-1), right.reshape(-1, width)).view(rows, self.size, width)

    def summed(self, right: Tensor) -> Tensor:
        """one-hot^T right over all examples -> (size,I)."""
        return right.new_zeros(self.size, right.shape[-1]).index_add_(0, self.ids.reshape(-1), right.reshape(-1, right.shape[-1]))


Left = Tensor | Index


def width(left: Left) -> int:
    """O."""
    return left.size if isinstance(left, Index) else left.shape[-1]


def outer(left: Left, right: Tensor) -> Tensor:
    """left^T right per example -> (B,O,I)."""
    return left.outer(right) if isinstance(left, Index) else torch.bmm(left.transpose(1, 2), right)


Pair = tuple[Left, Tensor]
_ROUNDING = 8  # times the machine epsilon: what products and sums of a few thousand terms may lose, over their terms' magnitudes


def wide(left: Left, right: Tensor) -> Pair:
    """The pair in fp32 or fp64. Products of half-precision numbers are exact there, so that norm and sum see one and the same gradient."""
    dtype = torch.promote_types(right.dtype, torch.float32)
    return left if isinstance(left, Index) else left.to(dtype), right.to(dtype)


def positions(uses: list[Pair]) -> int:
    """T over all uses."""
    return sum(right.shape[1] for _, right in uses)


def gram_squared_norms(uses: list[Pair]) -> Tensor:
    """||sum_u left_u^T right_u||^2 per example by inner products of positions (ghost norm; Li et al. 2022) -> (B,), from above.

    Sums over pairs of uses, so tied and reused weights are exact. Positions that cancel each other leave little but rounding, which
    could come out as nothing: `slack` is added, here of magnitudes that lie on the diagonals.
    """
    uses = [wide(*use) for use in uses]
    total, magnitude = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for first in range(len(uses)):
        for second in range(first, len(uses)):
            left = _inner(uses[first][0], uses[second][0])
            right = torch.bmm(uses[first][1], uses[second][1].transpose(1, 2))
            part = (left * right).sum((1, 2), dtype=torch.float64)
            total = total + part * (1 if first == second else 2)
            if first == second:
                diagonals = left.diagonal(dim1=1, dim2=2), right.diagonal(dim1=1, dim2=2)
                magnitude = magnitude + (diagonals[0].double() * diagonals[1].double()).sqrt().sum(1)
    return total.clamp(min=0) + slack(magnitude, uses[0][1].dtype)


def magnitudes(uses: list[Pair]) -> Tensor:
    """sum over positions of ||left_t|| ||right_t|| per example -> (B,) float64: the norm, if no two positions cancelled."""
    total = torch.zeros((), dtype=torch.float64)
    for left, right in uses:
        product = torch.linalg.vector_norm(right, dim=2).double()
        if not isinstance(left, Index):
            product = product * torch.linalg.vector_norm(left, dim=2).double()
        total = total + product.sum(1)
    return total


def slack(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """What a squared norm that was taken from factors must be raised by (B,), so that no rounding error hides a contribution.

    The clipped sum multiplies the same factors in another order. Its error is a few epsilons of `magnitudes`; a squared norm that is
    larger by a few epsilons of their square keeps that error below the square root of epsilon times the clip norm.
    """
    return _ROUNDING * torch.finfo(dtype).eps * magnitude.square()


def _inner(a: Left, b: Left) -> Tensor:
    """a b^T per example, (B,Ta,Tb)."""
    if isinstance(a, Index):
        if isinstance(b, Index):
            return (a.ids.unsqueeze(2) == b.ids.unsqueeze(1)).to(torch.float32)
        return _inner(b, a).transpose(1, 2)
    if isinstance(b, Index):
        return a.gather(2, b.ids.unsqueeze(1).expand(-1, a.shape[1], -1))
    return torch.bmm(a, b.transpose(1, 2))


def lookup_squared_norms(index: Index, right: Tensor) -> Tensor:
    """Squared norms of an embedding's per-example gradient by sums over equal ids, O(T I) each, no table, no T x T -> (B,), from above."""
    rows, length, width = right.shape
    ids, order = index.ids.sort(dim=1)
    fresh = torch.ones_like(ids, dtype=torch.bool)
    fresh[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slots = fresh.cumsum(1) - 1 + torch.arange(rows, device=ids.device).unsqueeze(1) * length
    ordered = right.gather(1, order.unsqueeze(2).expand(-1, -1, width))
    sums = right.new_zeros(rows * length, width).index_add_(0, slots.reshape(-1), ordered.reshape(-1, width))
    return squared(sums.view(rows, length, width)) + slack(magnitudes([(index, right)]), right.dtype)


def squared(stored: Tensor) -> Tensor:
    """Squared norms (B,) in float64 of gradients (B, ...).

    Rows of some thousand entries are normed in their own precision; one long sum in fp32 would come out too small.
    """
    rows = torch.linalg.vector_norm(stored, dim=-1) if stored.ndim > 1 else stored.abs()
    return rows.double().square().reshape(stored.shape[0], -1).sum(1)


def summed(left: Left, right: Tensor) -> Tensor:
    """left^T right over all examples and positions -> (O,I), one matrix product."""
    if isinstance(left, Index):
        return left.summed(right)
    return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])


def scaled(left: Left, right: Tensor, factors: Tensor) -> Pair:
    """The pair, in fp32 or better, with each example's product scaled by its factor (B,), applied to the narrower side."""
    left, right = wide(left, right)
    if isinstance(left, Index) or right.shape[-1] <= left.shape[-1]:
        return left, right * factors.view(-1, 1, 1).to(right.dtype)
    return left * factors.view(-1, 1, 1).to(left.dtype), right


def without(left: Left, right: Tensor, bad: Tensor) -> Pair:
    """The pair with zeros in the rows `bad`, whose entries are not finite."""
    if bad.numel():
        right = right.index_fill(0, bad, 0.0)
        left = left if isinstance(left, Index) else left.index_fill(0, bad, 0.0)
    return left, right
