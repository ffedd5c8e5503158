"""What in a forward pass comes from the batch, what is picked by its values, and what is drawn at
random.

An operation on parameters and constants alone is shared by all examples, whatever its shape; one
that takes anything from the batch is not. So shapes need no reading: constants are known, and all
else counts as the batch. A tensor is constant if it is a buffer, a frozen weight, made from numbers
alone, or computed from constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from grape_ray.engines.capture.batches import Batch, mapped, tensors_of
from grape_ray.engines.capture.draws import DRAWS, is_dropout, may_mask
from grape_ray.engines.capture.picks import MAY_PICK, WRITES_INTO, picks
from grape_ray.engines.capture.torch_functions import is_in_place, operation

# Results that follow from shapes and types, not from values.
VALUELESS = {
    "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty",
    "new_full", "rand_like", "randn_like",
}  # fmt: skip
# Ways of leaving torch; what comes back from there may hold anything.
_EXPORTS = {"numpy", "array", "tolist", "item", "int", "index", "float"}
_HALF = (torch.bfloat16, torch.float16)
_IMPORTS = {"from_numpy", "as_tensor", "tensor", "asarray", "frombuffer"}


def tensors_in(args: tuple, kwargs: dict | None) -> Iterator[Tensor]:
    """The tensors among the arguments, lists of them included."""
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(tuple(value), None)
        elif isinstance(value, dict):
            yield from tensors_in((), value)


class Dependence(TorchFunctionMode):
    """Follows a forward pass: which tensors are constant, and which hold rows that were picked
    across examples by their values. What is known of a tensor is noted on the tensor itself.

    Attributes:
        leaves: ids of the batch's own tensors.
        exported: whether whole numbers of the batch have left torch, so that the order of what
            follows may depend on what they say.
        drew: whether random numbers were drawn, other than for dropout of the batch's own
            activations, of which `masked` tells.
        half: whether any tensor was made in half precision.
        path: a number that tells one sequence of operations from another.

    Args:
        examples: their number B. constants: ids of tensors that are constant from the start.
            tracked_class: the class of tracked parameters.
    """

    def __init__(self, examples: int, constants: set[int], tracked_class: type):
        super().__init__()
        self.examples, self._fixed, self._tracked_class = examples, constants, tracked_class
        # Tensors are held, so that no other storage comes to lie at the same address:
        # storages that were constant until something of the batch was written there
        self._written: dict[int, Tensor] = {}
        self._picks = self._left_torch = False
        self.drew = self.masked = self.exported = False
        self.half, self.path = False, 0
        self.leaves: set[int] = set()

    def over(self, forward: Callable[[Batch, int], Tensor], batch: Batch) -> Tensor:
        """The losses of a forward pass (batch, B) -> (B,) under this mode, on containers of its
        own.
        """
        own = mapped(batch)
        self.leaves = {id(t) for t in tensors_of(own)}
        with self:
            return forward(own, self.examples)

    def constant(self, tensor: Tensor) -> bool:
        """Whether the batch has no part in a tensor."""
        if isinstance(tensor, self._tracked_class):
            return True
        if id(tensor) not in self._fixed and "_constant" not in tensor.__dict__:
            return False
        return not self._written or tensor.untyped_storage().data_ptr() not in self._written

    def certain(self, tensor: Tensor) -> bool:
        """Whether a tensor that is not constant is known to come from the batch, rather than of
        unknown origin (a cache, a closure).
        """
        return (
            tensor.requires_grad
            or id(tensor) in self.leaves
            or tensor.__dict__.get("_batch_in") is self
        )

    def picked(self, tensor: Tensor) -> str | None:
        """The operation that picked this tensor's rows across examples by their values, if any."""
        return tensor.__dict__.get("_picked_by") if self._picks else None

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        name = operation(func)
        self.path = hash((self.path, name))
        if may_mask(name, kwargs):
            self.masked = True
        if isinstance(out, Tensor):
            self.half |= out.dtype in _HALF
            if not out.requires_grad or self._picks:
                self._note(func, args, kwargs, (out,))
            else:  # a gradient comes from tracked parameters, and with them from the batch
                if name in MAY_PICK or is_in_place(func):
                    self._note(func, args, kwargs, (out,))
        elif name in _EXPORTS:
            if isinstance(args[0], Tensor) and not self.constant(args[0]):
                self._left_torch = True
                self.exported |= not args[0].is_floating_point()
        elif out is None or (isinstance(out, (tuple, list)) and out.__class__ is not torch.Size):
            self._note(func, args, kwargs, [t for t in out if isinstance(t, Tensor)] if out else ())
        return out

    def _all_constant(self, args: tuple, kwargs: dict | None) -> bool:
        return all(self.constant(t) for t in tensors_in(args, kwargs))

    def _note(
        self, func: Callable, args: tuple, kwargs: dict | None, out: Sequence[Tensor]
    ) -> None:
        name = operation(func)
        into = args[0] if args and isinstance(args[0], Tensor) else None
        in_place = into is not None and is_in_place(func)
        if into is not None and in_place and not self._all_constant(args[1:], kwargs):
            self._write(into)
        if kwargs and isinstance(kwargs.get("out"), Tensor) and not self._all_constant(args, None):
            self._write(kwargs["out"])
        if name in DRAWS or is_dropout(name, args, kwargs or {}):
            self._draw(name, args, kwargs, out)
        # made from numbers that may have been the batch's: neither constant nor certain
        elif name in _IMPORTS and self._left_torch:
            pass
        elif name in VALUELESS or self._all_constant(args, kwargs):
            self._mark(out)
        elif any(
            self.certain(t)
            for t in tensors_in(args, kwargs)
            if not isinstance(t, self._tracked_class)
        ):
            for tensor in out:
                vars(tensor)["_batch_in"] = self
        if self._picks or name in MAY_PICK:
            self._follow_picks(name, args, kwargs, out, in_place)

    def _mark(self, out: Sequence[Tensor]) -> None:
        for tensor in out:
            if not tensor.requires_grad and not isinstance(tensor, self._tracked_class):
                vars(tensor)["_constant"] = True

    def _write(self, into: Tensor) -> None:
        if not isinstance(into, self._tracked_class):
            vars(into).pop("_constant", None)
            # by storage, so that views of it are no longer constant either
            self._written[into.untyped_storage().data_ptr()] = into

    def _draw(self, name: str, args: tuple, kwargs: dict | None, out: Sequence[Tensor]) -> None:
        """A draw is constant as far as the batch is concerned; a mask that is laid over the batch
        is not.
        """
        if name in DRAWS or self._all_constant(args, kwargs):
            self.drew = True
            if name in VALUELESS or self._all_constant(args, kwargs):
                self._mark(out)

    def _follow_picks(
        self, name: str, args: tuple, kwargs: dict | None, out: Sequence[Tensor], in_place: bool
    ) -> None:
        by = name if self._picks_now(name, args, kwargs or {}) else None
        if by is None and self._picks:
            sources = args[:1] if name in WRITES_INTO or in_place else tensors_in(args, kwargs)
            by = next(
                (p for t in sources if isinstance(t, Tensor) and (p := self.picked(t)) is not None),
                None,
            )
        if by is not None:
            self._picks = True
            for tensor in out:
                if not isinstance(tensor, self._tracked_class):
                    vars(tensor)["_picked_by"] = by

    def _picks_now(self, name: str, args: tuple, kwargs: dict) -> bool:
        """Whether this call mixes up whose rows are whose by what they hold."""
        if (
            self.examples == 1
            or name not in MAY_PICK
            or not args
            or not isinstance(args[0], Tensor)
        ):
            return False
        if isinstance(args[0], self._tracked_class):
            return False
        # rows of a table are looked up by what a record holds; they become the record's
        if self.constant(args[0]) and name not in WRITES_INTO:
            return False
        return picks(name, args, kwargs, self.examples, self.constant, self.picked)
