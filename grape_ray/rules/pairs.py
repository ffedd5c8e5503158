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


def project(factor: Left, matrix: Tensor) -> Tensor:
    """factor @ matrix -> (B,T,R); a factor that was projected in the forward pass (width R) is returned as it is."""
    if isinstance(factor, Index):
        return factor.project(matrix)
    if factor.shape[-1] != matrix.shape[0]:
        return factor
    return factor @ matrix.to(factor.dtype)


def outer(left: Left, right: Tensor) -> Tensor:
    """left^T right per example -> (B,O,I)."""
    return left.outer(right) if isinstance(left, Index) else torch.bmm(left.transpose(1, 2), right)
