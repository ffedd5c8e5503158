"""Bounds on the rounding of float sums and products, and norms that are upper bounds in spite of it
("Norms are upper bounds", docs/privacy.md).

An inner product of n terms, added in any order, with or without fused multiplications, is off by at
most gamma_n times the sum of the terms' magnitudes, gamma_n = n u / (1 - n u) with u half the
machine epsilon (Higham 2002, section 3.1); what underflows, even where hardware flushes it to zero,
adds the smallest normal number for each term. Long sums are cut into blocks so that n stays small.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grape_ray.engines.precision import without_autocast

BLOCK = 512  # terms that are added in single precision before a sum goes on with the next block
# entries that are squared and added in single precision before a norm goes on in double precision
_SHORT = 64
_SPARE = 8  # roundings beside the sum itself: products, roots, the raising


def gamma(terms: int, dtype: torch.dtype) -> float:
    """The relative error bound of a sum of so many products; infinite where there is none to speak
    of.
    """
    lost = terms * torch.finfo(dtype).eps / 2
    return lost / (1 - lost) if lost < 0.5 else math.inf


def chain(terms: int) -> int:
    """Additions that a product of a blocked sum goes through at most."""
    return min(terms, BLOCK) + -(-terms // BLOCK)


def products(a: Tensor, b: Tensor) -> Tensor:
    """a b^T per example, (B,Ta,n) and (B,Tb,n) -> (B,Ta,Tb), by blocks of n and in their own
    precision even under autocast.
    """
    with without_autocast(a.device.type):
        parts = (
            torch.bmm(left, right.transpose(1, 2))
            for left, right in zip(a.split(BLOCK, 2), b.split(BLOCK, 2))
        )
        total = next(parts)
        for part in parts:
            total.add_(part)
    return total


def vector_lengths(vectors: Tensor) -> Tensor:
    """Upper bounds (...) on the lengths of vectors (..., n)."""
    squares = torch.linalg.vector_norm(vectors, dim=-1).square_()
    return (
        # of a square: (1 + g)^2 is 1 + 2 g, and g^2 less than the spare roundings
        squares.mul_(1 + 2 * gamma(vectors.shape[-1] + _SPARE, vectors.dtype))
        .add_(_underflow(vectors.dtype))
        .sqrt_()
    )


def total_length(squares: Tensor, terms: int) -> Tensor:
    """Upper bounds (B,) float64 on sqrt(sum_t |x_t|^2), from the squares (B,T) of vectors' lengths,
    computed as sums of so many terms.
    """
    dtype = squares.dtype
    total = squares.sum(1, dtype=torch.float64)
    return (
        total.mul_(1 + 2 * gamma(terms + _SPARE, dtype))
        .add_(squares.shape[1] * _underflow(dtype))
        .sqrt_()
    )


def _underflow(dtype: torch.dtype) -> float:
    """What is added to a squared length for what underflowed: gamma_n times two lengths is then
    never below n smallest normal numbers.
    """
    limits = torch.finfo(dtype)
    return 2 * limits.tiny / limits.eps


def matrix_norms(matrices: Tensor) -> Tensor:
    """Upper bounds (B,) float64 on the Frobenius norms of matrices (B,M,N), whose N is at most a
    few thousand.
    """
    rows = torch.linalg.vector_norm(matrices, dim=2).double()
    size = math.sqrt(matrices.shape[1] * matrices.shape[2])
    lost = gamma(matrices.shape[2] + _SPARE, matrices.dtype) + gamma(
        matrices.shape[1] + _SPARE, torch.float64
    )
    return (
        torch.linalg.vector_norm(rows, dim=1)
        .mul_(1 + lost)
        .add_(size * math.sqrt(torch.finfo(matrices.dtype).tiny))
    )


def dots(a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """sum of a * b, two (B,M,N), -> (B,) float64, and how far it may be off, relative to the
    product of their Frobenius norms.
    """
    total = torch.zeros(a.shape[0], dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(BLOCK, 2), b.split(BLOCK, 2)):
        total += torch.linalg.vecdot(left, right).sum(1, dtype=torch.float64)
    return total, gamma(min(a.shape[2], BLOCK) + 1, a.dtype) + gamma(
        a.shape[1] + _SPARE, torch.float64
    )


def squared(stored: Tensor) -> Tensor:
    """Squared norms (B,) in float64 of gradients (B, ...), upper bounds.

    Short blocks of entries are normed in their own precision, and those norms' squares added in
    float64.
    """
    flat = stored.reshape(stored.shape[0], math.prod(stored.shape[1:]))
    size, whole = flat.shape[1], flat.shape[1] - flat.shape[1] % _SHORT
    blocks = [flat[:, :whole].unflatten(1, (whole // _SHORT, _SHORT)), flat[:, whole:].unsqueeze(1)]
    total = torch.zeros(flat.shape[0], dtype=torch.float64, device=flat.device)
    for block in blocks:
        if block.numel():
            total += torch.linalg.vector_norm(block, dim=2).double().square_().sum(1)
    lost = gamma(min(size, _SHORT) + _SPARE, stored.dtype) + gamma(
        size // _SHORT + _SPARE, torch.float64
    )
    return total.mul_(1 + lost).add_(size * torch.finfo(stored.dtype).tiny)


def raised(squares: Tensor, error: Tensor | float) -> Tensor:
    """(sqrt(squares) + error)^2: the squared norm of what is at most `error` from a gradient with
    these squared norms.
    """
    return squares.sqrt().add(error).square()
