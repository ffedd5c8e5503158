"""The least time that a program over shapes would take on a device: of each operation its
arithmetic or its traffic with memory, whichever takes longer (Williams et al. 2009).

It is a bound, not a forecast: kernels reach a part of either, and what launches them takes time of
its own, most of a step where a model is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Device:
    """What a device can do at most, by its vendor's data sheet, without sparsity.

    Attributes:
        half, single: operations a second in bfloat16, and in float32 without TF32, which the engine
            does not use. bandwidth: bytes a second of its memory.
    """

    half: float
    single: float
    bandwidth: float


DEVICES = {
    "h100": Device(989e12, 67e12, 3.35e12),
    "h200": Device(989e12, 67e12, 4.8e12),
    "a100": Device(312e12, 19.5e12, 2.04e12),
    "l4": Device(121e12, 30.3e12, 0.3e12),
    "rtx4090": Device(165e12, 82.6e12, 1.01e12),
}


class Roofline(TorchDispatchMode):
    """Adds up operations while it is entered.

    Attributes:
        operations: multiplications and additions of products, each counted. seconds: at least.
    """

    def __init__(self, device: Device):
        super().__init__()
        self._device = device
        self.operations, self.seconds = 0, 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        traffic = sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
        arithmetic, count = 0.0, flop_registry.get(func._overloadpacket)
        if count is not None:
            operations = int(count(*args, **kwargs, out_val=out))
            half = all(t.dtype in (torch.bfloat16, torch.float16) for t in given if t.ndim > 1)
            arithmetic = operations / (self._device.half if half else self._device.single)
            self.operations += operations
        self.seconds += max(arithmetic, traffic / self._device.bandwidth)
        return out
