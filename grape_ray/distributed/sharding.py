"""Models larger than one device: FSDP2 gathers a block's weights for its use alone, and every rank
updates only the rows it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint


class Gate:
    """Takes the place of a sharded module's forward; calls a watcher each time the module's
    gathered weights are about to be used.

    FSDP2 puts gathered weights into the module before its forward, also when a backward pass
    recomputes it, and takes them out again.

    Args:
        forward: the module's own. recompute: keep only its inputs for the backward pass, which
            computes the rest again.
    """

    def __init__(self, forward: Callable[..., object], recompute: bool = False):
        self._forward, self._recompute = forward, recompute
        self.watcher: Callable[[], None] | None = None

    def __call__(self, *args: object, **kwargs: Any) -> object:
        if self._recompute and torch.is_grad_enabled():
            return checkpoint(self._enter, *args, use_reentrant=False, **kwargs)
        return self._enter(*args, **kwargs)

    def _enter(self, *args: object, **kwargs: object) -> object:
        if self.watcher is not None:
            self.watcher()
        return self._forward(*args, **kwargs)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: the entries of its longest outermost ModuleLists (encoder and
    decoder both, where it has both).
    """
    return [block for stack in stacks(model) for block in stack]


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost ModuleLists of a model that hold something, in its order."""
    found: list[nn.ModuleList] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child):
                found.append(child)
            else:
                walk(child)

    walk(model)
    return found


def recompute_blocks(model: nn.Module) -> None:
    """Activation checkpointing of each block of a model that is not sharded, in place."""
    for block in blocks(model):
        block.forward = Gate(block.forward, recompute=True)


def shard(
    model: nn.Module,
    device: torch.device,
    compute_dtype: torch.dtype | None = None,
    recompute: bool = False,
) -> None:
    """Shards a model's parameters by rows over all ranks of the default group (FSDP2), in place;
    every rank calls it.

    Args:
        device: where the shards live. compute_dtype: of gathered weights and activations, such as
            bfloat16; shards keep their own.
        recompute: activation checkpointing of each block.
    """
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype)
    for module in [*blocks(model), model]:  # inner modules first, as FSDP2 asks
        module.forward = Gate(module.forward, recompute and module is not model)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def gates(model: nn.Module) -> Iterator[tuple[nn.Module, Gate]]:
    """The sharded modules of a model, with their gates; none where it is not sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            gate = module.forward
            assert isinstance(gate, Gate)
            yield module, gate


def is_sharded(model: nn.Module) -> bool:
    """Whether the model went through `shard`."""
    return isinstance(model, FSDPModule)


def close(model: nn.Module) -> None:
    """Puts every module's own shards back in place, whatever a pass that broke off has left
    gathered.
    """
    for module, _ in gates(model):
        module.reshard()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def local(param: Tensor) -> Tensor:
    """What this rank holds of a parameter, without history: its rows, or all of it where it is not
    sharded.
    """
    return param.to_local().detach() if isinstance(param, DTensor) else param.detach()


def rows(param: Tensor) -> slice:
    """The rows of dimension 0 that this rank holds."""
    if not param.ndim:
        return slice(None)
    if not isinstance(param, DTensor):
        return slice(0, param.shape[0])
    shape, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    # a rank beyond a short tensor's rows holds none, at an offset that says nothing
    return slice(offset[0], offset[0] + shape[0]) if shape[0] else slice(0, 0)
