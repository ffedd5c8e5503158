"""Convolutions as matrix products over patches."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def patches(x: Tensor, kernel: tuple[int, ...], spec: tuple) -> Tensor:
    """Patches of x (N,C,L) or (N,C,H,W) -> (N, positions, C * kernel elements), in the order of the
    flattened weight.

    Args:
        spec: (stride, padding, dilation), a list each.
    """
    stride, padding, dilation = (tuple(s) for s in spec)
    kernel = tuple(kernel)
    if len(kernel) == 1:
        x, kernel = x.unsqueeze(2), (1, *kernel)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    return F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)
