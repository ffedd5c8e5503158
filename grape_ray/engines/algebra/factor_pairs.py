"""A weight's per-example gradient as a pair of factors: left (B,T,O) and right (B,T,I) stand for
left^T right, (B,O,I), never formed early.

Shapes: B examples, T positions, O and I the weight's two sides, R rank, U uses of one weight. Left
may be an `Index`: one-hot rows of an embedding table, kept as ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grape_ray.engines.algebra.rounding import (
    BLOCK,
    chain,
    dots,
    gamma,
    matrix_norms,
    products,
    raised,
    squared,
    total_length,
    vector_lengths,
)


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
        return out.index_add_(0, flat.reshape(-1), right.reshape(-1, width)).view(
            rows, self.size, width
        )

    def summed(self, right: Tensor) -> Tensor:
        """one-hot^T right over all examples -> (size,I)."""
        return right.new_zeros(self.size, right.shape[-1]).index_add_(
            0, self.ids.reshape(-1), right.reshape(-1, right.shape[-1])
        )


Left = Tensor | Index


def width(left: Left) -> int:
    """O."""
    return left.size if isinstance(left, Index) else left.shape[-1]


def outer(left: Left, right: Tensor) -> Tensor:
    """left^T right per example -> (B,O,I)."""
    return left.outer(right) if isinstance(left, Index) else torch.bmm(left.transpose(1, 2), right)


Pair = tuple[Left, Tensor]
# of a use: total lengths of the left and of the right factors, (B,) each
Sides = tuple[Tensor, Tensor]
_FEW_USES = 4  # of one weight, of which inner products are taken pair by pair

# of inner products, which fit a cache, and of gradients that exist at a time
_GRAM_ENTRIES, _GRADIENT_ENTRIES = 1 << 18, 1 << 21


def wide(left: Left, right: Tensor) -> Pair:
    """The pair in fp32 or fp64. Products of half-precision numbers are exact there, so that norm
    and sum see one and the same gradient.
    """
    dtype = torch.promote_types(right.dtype, torch.float32)
    return left if isinstance(left, Index) else left.to(dtype), right.to(dtype)


def joined(uses: list[Pair]) -> list[Pair]:
    """The uses as they are, or, where there are many as of a recurrent layer's steps, as one use of
    all their positions.
    """
    lefts = [left for left, _ in uses if isinstance(left, Tensor)]
    if len(uses) <= _FEW_USES or len(lefts) < len(uses):
        return uses
    return [(torch.cat(lefts, 1), torch.cat([right for _, right in uses], 1))]


def positions(uses: list[Pair]) -> int:
    """T over all uses."""
    return sum(right.shape[1] for _, right in uses)


def gram_squared_norms(uses: list[Pair]) -> Tensor:
    """||sum_u left_u^T right_u||^2 per example by inner products of positions (ghost norm; Li et
    al. 2022) -> (B,) float64, upper bounds.

    Sums over pairs of uses, so tied and reused weights are exact. Positions that cancel each other
    leave little but rounding, which could come out as nothing: each inner product may be off by
    gamma_n |left_s| |left_t|, and the most that this can do to the sum, by the Cauchy-Schwarz
    inequality, is added.
    """
    return torch.cat(
        [_gram(some) for some in _by_examples(uses, positions(uses) ** 2, _GRAM_ENTRIES)]
    )


def _gram(uses: list[Pair]) -> Tensor:
    """`gram_squared_norms` of some examples."""
    uses = [wide(*use) for use in uses]
    dtype = uses[0][1].dtype
    own = [(_inner(left, left, dtype), products(right, right)) for left, right in uses]
    sides = [_total_lengths(use, grams) for use, grams in zip(uses, own)]
    parts = []
    for first, (left, right) in enumerate(uses):
        parts.append(_entrywise(*own[first], sides[first], sides[first], left, right))
        for second in range(first + 1, len(uses)):
            crossed = _inner(left, uses[second][0], dtype), products(right, uses[second][1])
            parts.append(2 * _entrywise(*crossed, sides[first], sides[second], left, right))
    total, off = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    squares = total.clamp(min=0) + off + positions(uses) ** 2 * torch.finfo(dtype).tiny
    # What is summed in the end is rounded by as much as this of the magnitudes, which a length
    # times b length bounds.
    return raised(squares, torch.finfo(dtype).eps * sum(a * b for a, b in sides))


def _total_lengths(use: Pair, grams: tuple[Tensor, Tensor]) -> Sides:
    """Of the left and of the right factors, from their inner products with themselves."""
    left, right = (gram.diagonal(dim1=1, dim2=2) for gram in grams)
    return total_length(left, chain(width(use[0]))), total_length(right, chain(use[1].shape[-1]))


def _entrywise(
    left: Tensor, right: Tensor, rows: Sides, columns: Sides, one: Left, other: Tensor
) -> Tensor:
    """sum of left * right, two (B,Ta,Tb) of inner products, and what errors in them can change of
    it -> (2,B).

    With total lengths (a, b) of the rows' and (a', b') of the columns' factors, the errors are
    matrices of a Frobenius norm of at most gamma a a' in `left` and gamma b b' in `right`. One-hot
    rows are exact.
    """
    dtype = right.dtype
    off_left = (
        gamma(0 if isinstance(one, Index) else chain(one.shape[-1]), dtype) * rows[0] * columns[0]
    )
    off_right = gamma(chain(other.shape[-1]), dtype) * rows[1] * columns[1]
    norms = matrix_norms(left), matrix_norms(right)
    total, last = dots(left, right)
    crossed = off_left * norms[1] + off_right * norms[0] + off_left * off_right
    return torch.stack([total, crossed + last * norms[0] * norms[1]])


def outer_squared_norms(uses: list[Pair], small: Tensor | None = None) -> Tensor:
    """||sum_u left_u^T right_u + small||^2 per example from the gradients themselves, some examples
    at a time -> (B,) float64, upper bounds.

    Args:
        small: what else there is of the gradient, (B, ...) of as many entries, or None.
    """
    uses = [wide(*use) for use in uses]
    (left, right), dtype = uses[0], uses[0][1].dtype
    entries, found, first = width(left) * right.shape[-1], [], 0
    for some in _by_examples(uses, entries, _GRADIENT_ENTRIES):
        whole = _whole(some)
        last = first + whole.shape[0]
        found.append(
            squared(whole if small is None else whole + small[first:last].view(whole.shape))
        )
        first = last
    terms = len(uses) + max(
        right.shape[1] if isinstance(left, Index) else chain(right.shape[1]) for left, right in uses
    )
    underflow = positions(uses) * math.sqrt(entries) * torch.finfo(dtype).tiny
    return raised(torch.cat(found), gamma(terms + 2, dtype) * magnitudes(uses) + underflow)


def _by_examples(uses: list[Pair], entries: int, most: int) -> Iterator[list[Pair]]:
    """The pairs of some examples after the other, as many as have `most` entries together, or one;
    all of them on an accelerator.
    """
    rows, device = uses[0][1].shape[0], uses[0][1].device.type
    size = max(1, most // max(entries, 1)) if device == "cpu" else max(rows, 1)
    for first in range(0, max(rows, 1), size):
        some = slice(first, first + size)
        yield [
            (
                Index(left.ids[some], left.size) if isinstance(left, Index) else left[some],
                right[some],
            )
            for left, right in uses
        ]


def _whole(uses: list[Pair]) -> Tensor:
    """sum_u left_u^T right_u (B,O,I), by blocks of positions."""
    total = None
    for left, right in uses:
        if isinstance(left, Index):
            parts = [left.outer(right)]
        else:
            cut = zip(left.split(BLOCK, 1), right.split(BLOCK, 1))
            parts = (products(some.transpose(1, 2), others.transpose(1, 2)) for some, others in cut)
        for part in parts:
            total = part if total is None else total.add_(part)
    assert total is not None
    return total


def magnitudes(uses: list[Pair]) -> Tensor:
    """sum over positions of ||left_t|| ||right_t|| per example -> (B,) float64, an upper bound:
    the norm, if no two positions cancelled.
    """
    total = torch.zeros((), dtype=torch.float64)
    for left, right in uses:
        product = vector_lengths(right).double()
        if not isinstance(left, Index):
            product = product * vector_lengths(left).double()
        total = total + product.sum(1)
    return total


def _inner(a: Left, b: Left, dtype: torch.dtype) -> Tensor:
    """a b^T per example, (B,Ta,Tb), in the dtype of both, or of their right factors."""
    if isinstance(a, Index):
        if isinstance(b, Index):
            return (a.ids.unsqueeze(2) == b.ids.unsqueeze(1)).to(dtype)
        return _inner(b, a, dtype).transpose(1, 2)
    if isinstance(b, Index):
        return a.gather(2, b.ids.unsqueeze(1).expand(-1, a.shape[1], -1))
    return products(a, b)


def lookup_squared_norms(index: Index, right: Tensor) -> Tensor:
    """Squared norms of an embedding's per-example gradient by sums over equal ids, O(T I) each, no
    table, no T x T -> (B,), upper bounds.
    """
    rows, length, width = right.shape
    ids, order = index.ids.sort(dim=1)
    fresh = torch.ones_like(ids, dtype=torch.bool)
    fresh[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slots = fresh.cumsum(1) - 1 + torch.arange(rows, device=ids.device).unsqueeze(1) * length
    ordered = right.gather(1, order.unsqueeze(2).expand(-1, -1, width))
    sums = right.new_zeros(rows * length, width).index_add_(
        0, slots.reshape(-1), ordered.reshape(-1, width)
    )
    # A sum of k rows is off by gamma_k times the sum of their lengths; one row alone is exact.
    sizes = vector_lengths(ordered).double()
    magnitude = sizes.new_zeros(rows * length).index_add_(0, slots.reshape(-1), sizes.reshape(-1))
    count = torch.zeros_like(magnitude).index_add_(
        0, slots.reshape(-1), torch.ones_like(sizes).reshape(-1)
    )
    error = (
        (count - 1)
        .clamp_(min=0)
        .mul_(gamma(length, right.dtype) / max(length, 1))
        .mul_(magnitude)
        .view(rows, length)
    )
    return raised(squared(sums.view(rows, length, width)), torch.linalg.vector_norm(error, dim=1))


def summed(left: Left, right: Tensor) -> Tensor:
    """left^T right over all examples and positions -> (O,I), one matrix product."""
    if isinstance(left, Index):
        return left.summed(right)
    return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])


def scaled(left: Left, right: Tensor, factors: Tensor) -> Pair:
    """The pair, in fp32 or better, with each example's product scaled by its factor (B,), applied
    to the narrower side.
    """
    left, right = wide(left, right)
    # the rounding of the product is the same on either side; one-hot rows stay one-hot
    if isinstance(left, Index) or right.shape[-1] <= left.shape[-1]:
        return left, right * factors.view(-1, 1, 1).to(right.dtype)
    return left * factors.view(-1, 1, 1).to(left.dtype), right


def without(left: Left, right: Tensor, bad: Tensor) -> Pair:
    """The pair with zeros in the rows `bad`, whose entries are not finite."""
    if bad.numel():
        # set, not multiplied: NaN times zero is NaN
        right = right.index_fill(0, bad, 0.0)
        left = left if isinstance(left, Index) else left.index_fill(0, bad, 0.0)
    return left, right
