"""Randomized estimates of a per-example squared gradient norm: Hutchinson and Hutch++.

The per-example gradient is M = left^T right, (O,I); probes P have K columns with entries N(0, 1/K),
so E ||M P||^2 = ||M||^2 and ||M P||^2 is distributed as sum_i lambda_i chi2_K / K with lambda the
squared singular values (docs/privacy.md, Lemma 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from grape_ray.engines.algebra.factor_pairs import Index, Left, Pair, magnitudes, positions, width
from grape_ray.engines.algebra.rounding import gamma, raised, squared

# side -> probes (B, side, K), or (1, side, K) where the batch shares them
Draw = Callable[[int], Tensor]


def probes_right(uses: list[Pair]) -> bool:
    """Whether the probes lie on the right side: the narrower one, so that fewer normals are drawn;
    always beside an Index.
    """
    return any(isinstance(left, Index) for left, _ in uses) or uses[0][1].shape[-1] <= width(
        uses[0][0]
    )


def sketch(left: Left, right: Tensor, probes: Tensor, on_right: bool) -> Tensor:
    """M P (B,O,K), or M^T P (B,I,K) with probes on the left side; T K (O + I) multiplications, fp32
    or better.
    """
    if on_right:
        small = right.to(probes.dtype) @ probes
        return (
            left.outer(small)
            if isinstance(left, Index)
            else torch.bmm(left.to(probes.dtype).transpose(1, 2), small)
        )
    assert not isinstance(left, Index)
    return torch.bmm(right.to(probes.dtype).transpose(1, 2), left.to(probes.dtype) @ probes)


def upper_bound(estimate: Tensor, uses: list[Pair]) -> Tensor:
    """The estimate (B,), raised by what rounding may have taken from it.

    A column p of the probes is multiplied with an error of gamma |p| sum_t |left_t| |right_t| at
    most, and all columns together have norm sqrt(side) or little more.
    """
    right = uses[0][1]
    side = right.shape[-1] if probes_right(uses) else width(uses[0][0])
    terms = positions(uses) + max(side, right.shape[-1]) + 8
    return raised(estimate, 2 * math.sqrt(side) * gamma(terms, right.dtype) * magnitudes(uses))


def hutchinson(uses: list[Pair], draw: Draw) -> Tensor:
    """||M P||^2 per example (B,), the uses added before the square so that tied weights share one
    P.
    """
    on_right = probes_right(uses)
    probes = draw(uses[0][1].shape[-1] if on_right else width(uses[0][0]))
    total = torch.stack([sketch(left, right, probes, on_right) for left, right in uses]).sum(0)
    return squared(total)


def hutch_plus_plus(uses: list[Pair], draw: Draw) -> Tensor:
    """||M Q||^2 + ||M (I - Q Q^T) P||^2 with Q an orthonormal basis of M^T M S (Meyer et al. 2021)
    per example (B,).

    Given Q the second term is Hutchinson's on the rest of M, so it is again distributed as a
    mixture of an exact part and chi2_K / K.
    """
    left = torch.cat([left for left, _ in uses if not isinstance(left, Index)], 1)
    right = torch.cat([right for _, right in uses], 1)
    seeds, probes = draw(right.shape[-1]), draw(right.shape[-1])

    def times(vectors: Tensor) -> Tensor:
        return sketch(left, right, vectors, True)

    pulled = torch.bmm(right.to(seeds.dtype).transpose(1, 2), left.to(seeds.dtype) @ times(seeds))
    # QR stops at what is not finite; such an example counts as zero later
    finite = torch.isfinite(pulled).flatten(1).all(1).view(-1, 1, 1)
    basis, _ = torch.linalg.qr(torch.where(finite, pulled, torch.zeros_like(pulled)))
    rest = probes - basis @ (basis.transpose(1, 2) @ probes)
    return squared(times(basis)) + squared(times(rest))
