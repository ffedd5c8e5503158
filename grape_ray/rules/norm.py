"""Per-example gradients of a layer normalisation's scale and shift."""

from __future__ import annotations

from torch import Tensor


def scale_and_shift(x: Tensor, grad: Tensor, mean: Tensor, rstd: Tensor, rows: int, dims: int, scale: bool) -> tuple[Tensor | None, Tensor]:
    """Sums over each example's positions of grad * normalised x, and of grad.

    Args:
        x, grad: (rows * k, ..., *shape), with `shape` the last `dims` dimensions. mean, rstd: as of native_layer_norm.

    Returns:
        (rows, numel of shape) each; the first is None unless `scale`.
    """
    width = x[(0,) * (x.ndim - dims)].numel()
    shift = grad.reshape(rows, -1, width).sum(1)
    if not scale:
        return None, shift
    return x.sub(mean).mul_(rstd).mul_(grad).reshape(rows, -1, width).sum(1), shift
