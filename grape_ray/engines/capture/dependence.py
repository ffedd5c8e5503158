"""What in a forward pass comes from the batch, what is picked by its values, and what is drawn at
random.

An operation on parameters and constants alone is shared by all examples, whatever its shape; one
that takes anything from the batch is not. So shapes need no reading: constants are known, and all
else counts as the batch. A tensor is constant if it is a buffer, a frozen weight, made from numbers
alone, or computed from constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from grape_ray.engines.capture.batches import mapped, tensors_of
from grape_ray.engines.capture.torch_functions import is_in_place, operation

# Results that follow from shapes and types, not from values.
VALUELESS = {
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "rand_like",
    "randn_like",
}
# Ways of leaving torch; what comes back from there may hold anything.
_EXPORTS = {"numpy", "array", "tolist", "item", "int", "index", "float"}
_IMPORTS = {"from_numpy", "as_tensor", "tensor", "asarray", "frombuffer"}
# Operations that put values at places of their first argument, whose shape they keep.
WRITES_INTO = {
    "setitem", "index_put", "index_add", "index_copy", "index_fill", "index_reduce", "scatter",
    "scatter_add", "scatter_reduce", "masked_scatter", "masked_fill", "copy", "select_scatter",
    "slice_scatter", "put",
}  # fmt: skip
DROPOUTS = {
    "dropout",
    "alpha_dropout",
    "feature_dropout",
    "feature_alpha_dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "native_dropout",
}
# Where layers that torch computes in one call are told their dropout.
DROPOUT_AT = {"multi_head_attention_forward": 10, "lstm": 5, "gru": 5, "rnn_tanh": 5, "rnn_relu": 5}
_MASKING = {*DROPOUTS, *DROPOUT_AT, "scaled_dot_product_attention"}
# Draws and, where they are bounded or usual, a low and a high value of theirs.
DRAWS: dict[str, tuple[float, float] | None] = {
    "rand": (0.0, 1 - 2**-24), "rand_like": (0.0, 1 - 2**-24), "bernoulli": (0.0, 1.0),
    "uniform": None, "randn": (-3.0, 3.0), "randn_like": (-3.0, 3.0), "normal": None,
    "randint": None, "randint_like": None, "randperm": None, "random": None, "binomial": None,
    "standard_gamma": None, "sample_dirichlet": None, "gumbel_softmax": None, "rrelu": None,
    "exponential": (2**-10, 8.0), "geometric": None, "cauchy": None, "log_normal": None,
    "poisson": None, "multinomial": None,
}  # fmt: skip


def is_draw(name: str) -> bool:
    """Whether an operation draws at random."""
    return name in DRAWS


def is_dropout(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a call draws a mask: a dropout in training whose probability is not 0."""
    if name not in DROPOUTS:
        return False
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return bool(training) and p != 0


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
    """Watches a forward pass: which tensors are constant, and which hold rows that were picked
    across examples by their values.

    Attributes:
        leaves: ids of the batch's own tensors.
        exported: whether whole numbers of the batch have left torch, so that the order of what
            follows may depend on what they say.
        drew: whether random numbers were drawn, other than for dropout of the batch's own
            activations, of which `masked` tells.

    Args:
        rows: examples B. constants: ids of tensors that are constant from the start. stand_in: the
            class of tracked parameters.
    """

    def __init__(self, rows: int, constants: set[int], stand_in: type):
        super().__init__()
        self.rows, self._fixed, self._stand_in = rows, constants, stand_in
        # storages that were constant until something of the batch was written there
        self._written: dict[int, Tensor] = {}
        self._picks = self._left_torch = False
        self.drew = self.masked = self.exported = False
        self.leaves: set[int] = set()

    def over(self, forward: Callable[[Any, int], Tensor], batch: Any) -> Tensor:
        """The losses of a forward pass (batch, B) -> (B,) under this watch, on containers of its
        own.
        """
        own = mapped(batch)
        self.leaves = {id(t) for t in tensors_of(own)}
        with self:
            return forward(own, self.rows)

    def constant(self, tensor: Tensor) -> bool:
        """Whether the batch has no part in a tensor."""
        if isinstance(tensor, self._stand_in):
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
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = operation(func)
        if name in _MASKING and (
            name != "scaled_dot_product_attention" or (kwargs and kwargs.get("dropout_p"))
        ):
            self.masked = True
        if isinstance(out, Tensor):
            if not out.requires_grad or self._picks:
                self._note(func, args, kwargs, (out,))
            else:  # a gradient comes from tracked parameters, and with them from the batch
                if name in _ACROSS or is_in_place(func):
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

    def _note(self, func: Callable, args: tuple, kwargs: dict | None, out: Any) -> None:
        name = operation(func)
        into = args[0] if args and isinstance(args[0], Tensor) else None
        in_place = into is not None and is_in_place(func)
        if in_place and not self._all_constant(args[1:], kwargs):
            self._write(into)
        if kwargs and isinstance(kwargs.get("out"), Tensor) and not self._all_constant(args, None):
            self._write(kwargs["out"])
        if name in DRAWS or is_dropout(name, args, kwargs or {}):
            self._draw(name, args, kwargs, out)
        elif name in _IMPORTS and self._left_torch:
            pass
        elif name in VALUELESS or self._all_constant(args, kwargs):
            self._mark(out)
        elif any(
            self.certain(t) for t in tensors_in(args, kwargs) if not isinstance(t, self._stand_in)
        ):
            for tensor in out:
                tensor._batch_in = self
        if self._picks or name in _ACROSS:
            self._follow_picks(name, args, kwargs, out, in_place)

    def _mark(self, out: Any) -> None:
        for tensor in out:
            if not tensor.requires_grad and not isinstance(tensor, self._stand_in):
                tensor._constant = True

    def _write(self, into: Any) -> None:
        if not isinstance(into, self._stand_in):
            into.__dict__.pop("_constant", None)
            self._written[into.untyped_storage().data_ptr()] = into

    def _draw(self, name: str, args: tuple, kwargs: dict | None, out: Any) -> None:
        """A draw is constant as far as the batch is concerned; a mask that is laid over the batch
        is not.
        """
        if name in DRAWS or self._all_constant(args, kwargs):
            self.drew = True
            if name in VALUELESS or self._all_constant(args, kwargs):
                self._mark(out)

    def _follow_picks(
        self, name: str, args: tuple, kwargs: dict | None, out: Any, in_place: bool
    ) -> None:
        by = self._picks_now(name, args, kwargs or {})
        if by is None and self._picks:
            sources = args[:1] if name in WRITES_INTO or in_place else tensors_in(args, kwargs)
            by = next(
                (p for t in sources if isinstance(t, Tensor) and (p := self.picked(t)) is not None),
                None,
            )
        if by is not None:
            self._picks = True
            for tensor in out:
                if not isinstance(tensor, self._stand_in):
                    tensor._picked_by = by

    def _picks_now(self, name: str, args: tuple, kwargs: dict) -> str | None:
        """The name of the operation where this call mixes up whose rows are whose by what they
        hold.
        """
        if self.rows == 1 or name not in _ACROSS or not args or not isinstance(args[0], Tensor):
            return None
        source = args[0]
        if isinstance(source, self._stand_in) or (
            self.constant(source) and name not in WRITES_INTO
        ):
            return None
        if name == "getitem":
            return self._picked_by_index(source, args[1])
        if name in WRITES_INTO:
            return self._written_by_index(name, args)
        if name in (
            "nonzero",
            "argwhere",
            "masked_select",
            "unique",
            "pack_padded_sequence",
            "unique_consecutive",
            "take",
        ):
            return name
        if name == "repeat_interleave":
            repeats = kwargs.get("repeats", args[1] if len(args) > 1 else None)
            return name if isinstance(repeats, Tensor) and not self.constant(repeats) else None
        if name == "where":
            return name if len(args) == 1 and not kwargs else None
        dim = kwargs.get(
            "dim", args[_DIM_AT[name]] if len(args) > _DIM_AT[name] else _DIM_IF_UNSAID[name]
        )
        if (
            not isinstance(dim, int)
            or source.ndim == 0
            or dim % source.ndim != 0
            or source.shape[0] % self.rows
        ):
            return None
        if name in ("index_select", "gather", "take_along_dim"):
            index = kwargs.get(
                "index", kwargs.get("indices", args[2 if name != "take_along_dim" else 1])
            )
            return None if self.constant(index) else name
        return name  # sorts along the examples

    def _written_by_index(self, name: str, args: tuple) -> str | None:
        """Whether rows of the batch, in their own order, are written to places that data say;
        picked rows may be put back so.
        """
        if name in ("setitem", "index_put"):
            places = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
            index, values = (places[0] if places else None), args[2]
        elif (
            name
            in (
                "index_add",
                "index_copy",
                "scatter",
                "scatter_add",
                "scatter_reduce",
                "index_reduce",
            )
            and len(args) > 3
        ):
            if not isinstance(args[1], int) or args[1] % args[0].ndim:
                return None
            index, values = args[2], args[3]
        else:
            return None
        if (
            not isinstance(index, Tensor)
            or not isinstance(values, Tensor)
            or index.ndim == 0
            or self.constant(index)
            or self.constant(values)
        ):
            return None
        return None if self.picked(values) or values.ndim == 0 else name

    def _picked_by_index(self, source: Tensor, index: Any) -> str | None:
        """Whether `source[index]` picks across examples; harmless if each example's picks are as
        many and stay in order.
        """
        places = index if isinstance(index, tuple) else (index,)
        first = places[0] if places else None
        if not isinstance(first, Tensor) or first.ndim == 0 or self.constant(first):
            return None
        if source.shape[0] != self.rows or not all(isinstance(p, (Tensor, slice)) for p in places):
            return "getitem"
        used = max(
            1, sum(p.ndim if isinstance(p, Tensor) and p.dtype == torch.bool else 1 for p in places)
        )
        number = (
            torch.arange(self.rows, device=source.device)
            .view(-1, *[1] * (used - 1))
            .expand(source.shape[:used])
        )
        owner = number[index].reshape(-1)
        regular = owner.numel() % self.rows == 0 and torch.equal(
            owner,
            torch.arange(self.rows, device=owner.device).repeat_interleave(
                owner.numel() // self.rows
            ),
        )
        return None if regular else "getitem"


# Operations that can move rows from one example to another, and where their dimension stands.
_DIM_AT = {
    "index_select": 1,
    "gather": 1,
    "take_along_dim": 2,
    "sort": 1,
    "argsort": 1,
    "topk": 2,
    "msort": 9,
    "kthvalue": 2,
}
_DIM_IF_UNSAID: dict[str, int | None] = {
    "index_select": None, "gather": None, "take_along_dim": None, "sort": -1, "argsort": -1,
    "topk": -1, "msort": 0, "kthvalue": -1,
}  # fmt: skip
_ACROSS = {
    "getitem", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive",
    "pack_padded_sequence", "take", "repeat_interleave", "where", *_DIM_AT, *WRITES_INTO,
}  # fmt: skip
