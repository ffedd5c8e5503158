"""What a forward pass may not change: parameters, buffers and attributes of modules.

State that a pass writes is a function of the examples, without noise: it would be saved with the
model, or shape later gradients.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from grape_ray.distributed import sharding
from grape_ray.errors import UnsupportedLayer

_REGISTRIES = {"_parameters", "_buffers", "_modules"}
_SMALL_BYTES = 1 << 12  # of a buffer or array whose contents are compared after every pass


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are not saved included; a shared tensor under each
    of its names.
    """
    found = {}
    for prefix, module in model.named_modules():
        for held in (module._buffers, module._parameters):
            for key, tensor in held.items():
                if tensor is not None:
                    found[f"{prefix}.{key}" if prefix else key] = tensor
    return found


def untrained(model: nn.Module) -> dict[str, Tensor]:
    """Buffers and frozen parameters by name."""
    return {name: tensor for name, tensor in state_of(model).items() if not _trained(tensor)}


def _trained(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def checksum(tensor: Tensor) -> int:
    """A number that any change of bits is all but certain to change; at the speed of memory, not of
    cryptography.

    The sum of all words, and of all words times their position modulo 2^16, so that exchanged
    values show too.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    size = flat.element_size()
    words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    plain = mixed = 0
    for chunk in words.split(1 << 20):  # in the cache, and no copy of a large tensor in int64
        chunk = chunk.long()
        plain += int(chunk.sum())
        mixed += int(
            (
                chunk * torch.arange(1, len(chunk) + 1, device=chunk.device).bitwise_and_(0xFFFF)
            ).sum()
        )
    return hash((plain, mixed, tuple(tensor.shape), str(tensor.dtype)))


def check_kinds(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Refuses what cannot be clipped, trained or watched: complex and fp16 parameters, hooks on
    gradients, state that modules add to what is saved.
    """
    for name, param in params.items():
        if param.is_complex():
            fix = (
                "hold its real and imaginary parts as one real parameter, and use"
                " torch.view_as_complex of it"
            )
            raise UnsupportedLayer(
                f"parameter '{name}'",
                "complex numbers",
                "real numbers, which clipping and noise are defined for",
                fix,
            )
        if param.dtype == torch.float16:
            expected = "bfloat16 (trained with stochastic rounding), float32 or float64"
            fix = (
                "load the model with dtype=torch.bfloat16 or torch.float32: most of a private step"
                " is lost in float16"
            )
            raise UnsupportedLayer(f"parameter '{name}'", "float16", expected, fix)
        if param._backward_hooks:
            raise UnsupportedLayer(
                f"parameter '{name}'",
                "a hook on its gradient",
                "none: no gradient of the batch ever reaches a parameter",
                "remove the hook; scale the parameter where it is used instead",
            )
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise UnsupportedLayer(
                f"module '{name}'",
                "get_extra_state",
                "parameters and buffers, which can be watched",
                "keep it in a buffer",
            )


@contextlib.contextmanager
def awake(model: nn.Module) -> Iterator[None]:
    """Small values, during a verification, in trainable tensors that are all zeros at the start, as
    LoRA's are: no gradient passes through zeros, so verification would see none and could not say
    which row belongs to whom. They are zeros again afterwards.
    """
    zeros = [
        p
        for p in model.parameters()
        if p.requires_grad and p.numel() and not bool(p.detach().any())
    ]
    # of its own: no random number of the run is consumed
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in zeros:
            param.copy_(torch.randn(param.shape, generator=generator).mul_(0.02))
    try:
        yield
    finally:
        with torch.no_grad():
            for param in zeros:
                param.zero_()


def _contents(value: object) -> object:
    """What a plain attribute holds, as far as a pass could add to it: versions of tensors, bytes of
    small arrays, members of containers.
    """
    if isinstance(value, Tensor):
        # inference tensors count no versions
        return None if value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        # NumPy counts no writes: small ones are compared whole
        return value.tobytes() if value.nbytes <= _SMALL_BYTES else value.shape
    if isinstance(value, (list, deque)):
        # by identity: to compare members may be dear, or code of the model's own
        return [id(member) for member in value]
    if isinstance(value, (dict, set)) and not isinstance(value, nn.Module):
        return [id(member) for member in (value.values() if isinstance(value, dict) else value)]
    return None


class ModelSnapshot:
    """The state of a model before a pass, and what has to hold after it.

    Guarantees: what a pass rebinds among the attributes of modules (`self.mean = ...`) is put back
    at its end, so that no pass knows what an earlier one left there. Writes into buffers and
    weights, trained ones included, are refused: by identity and version after every pass, and bit
    by bit, which also finds what goes past torch (`.data`, numpy), wherever a pass is verified.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._modules = list(model.modules())
        self._attributes: list[dict[str, object]] = [
            dict(module.__dict__) for module in self._modules
        ]
        self._held = [
            (f"{name}.{key}" if name else key, value, seen)
            for name, module in model.named_modules()
            for key, value in module.__dict__.items()
            if key not in _REGISTRIES
            and not key.startswith("_")
            and (seen := _contents(value)) is not None
        ]
        self._tensors = state_of(model)
        self._small = [
            (name, tensor, checksum(tensor))
            for name, tensor in self._tensors.items()
            if not isinstance(tensor, nn.Parameter)
            and tensor.numel() * tensor.element_size() <= _SMALL_BYTES
            # to read one from a device would wait for all that is queued there
            and tensor.is_cpu
        ]
        self._versions = {
            name: tensor._version
            for name, tensor in self._tensors.items()
            if not tensor.is_inference()
        }

    def constants(self) -> set[int]:
        """The ids of tensors that the pass's batch has not touched: untrained ones, and those that
        modules hold as attributes.
        """
        held = {
            id(value)
            for attributes in self._attributes
            for value in attributes.values()
            if isinstance(value, Tensor)
        }
        return held | {id(tensor) for tensor in self._tensors.values() if not _trained(tensor)}

    def contents(self) -> dict[str, int]:
        """A checksum of each parameter and buffer as it is now; of one that a pass replaced,
        `check` tells.
        """
        return {name: checksum(tensor) for name, tensor in self._tensors.items()}

    def restore_attributes(self) -> None:
        """Puts back every attribute that the pass has rebound, added or deleted."""
        for module, before in zip(self._modules, self._attributes):
            now = module.__dict__
            for key in set(now) - set(before):
                del now[key]
            # parameters and buffers that were replaced are refused by `check`, not put back
            now.update({key: value for key, value in before.items() if key not in _REGISTRIES})

    def check(self) -> None:
        """Raises UnsupportedLayer where a parameter or buffer was replaced or written to, or an
        attribute's contents were.
        """
        for name, value, seen in self._held:
            if _contents(value) != seen:
                raise written(name)
        for name, tensor, seen in self._small:
            if checksum(tensor) != seen:
                raise written(name)
        after = state_of(self._model)
        for name in {**self._tensors, **after}:
            old, new = self._tensors.get(name), after.get(name)
            if old is not new or (
                new is not None and name in self._versions and new._version != self._versions[name]
            ):
                raise written(name)


class UntrainedState:
    """The untrained tensors of a model as training begins; what is saved with it later must be
    these, bit for bit.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._sums = self._now()

    def _now(self) -> dict[str, int]:
        return {
            name: checksum(sharding.local(tensor))
            for name, tensor in untrained(self._model).items()
        }

    def check(self) -> None:
        """Raises UnsupportedLayer, naming a tensor that changed."""
        for name, seen in self._now().items():
            if self._sums.get(name) != seen:
                raise written(name)


def written(name: str) -> UnsupportedLayer:
    """The refusal of a pass that changes a tensor."""
    return UnsupportedLayer(
        f"tensor '{name}' is written to in the forward pass",
        None,
        "a forward pass that changes nothing (what it writes is a function of the examples, without"
        " noise)",
        "call .eval() on the layer that keeps statistics, or replace it",
    )
