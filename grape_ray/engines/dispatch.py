"""Chooses what happens when an operation meets a tracked parameter.

In this order: a rule of the user's; reads that involve no gradient; a fast rule (linear, embedding, convolution, layer norm); a
broadcast operation, where every example gets its own copy of the value; and last vmap over the examples, exact for whatever
torch.func can batch. What none of them can do is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from grape_ray.engines.taps import ExpandTap
from grape_ray.engines.tracked import Session, Tracked, _no_subclass, tracked_in, values_of
from grape_ray.errors import UnsupportedLayer

Rule = Callable[[Session, Callable, str, tuple, dict], Any]

READS = {
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_leaf", "is_sparse", "is_quantized",
    "is_meta", "is_mps", "is_xpu", "is_nested", "itemsize", "nbytes", "names", "grad", "grad_fn", "data", "size", "dim", "ndimension",
    "numel", "nelement", "stride", "is_contiguous", "element_size", "len", "is_floating_point", "is_complex", "data_ptr", "get_device",
    "storage_offset", "repr", "format", "detach", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
    "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "type_as", "is_pinned", "untyped_storage", "broadcast_shapes",
    "result_type", "requires_grad_", "is_same_size", "deepcopy", "hash", "is_inference", "is_grad",
}  # fmt: skip
SAME_UP_TO_CAST = {"to", "float", "double", "half", "bfloat16", "contiguous", "type", "clone", "cuda", "cpu"}
BROADCASTS = {
    "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "div", "truediv", "rdiv", "rtruediv", "itruediv", "pow", "rpow",
    "where", "maximum", "minimum", "lerp", "addcmul", "addcdiv", "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "subtract",
    "multiply", "divide",
}  # fmt: skip
_USER: dict[Any, Callable] = {}
_FAST: dict[str, Rule] = {}


def register_rule(function: Callable, per_example_grad: Callable) -> None:
    """Teaches the engines a torch function (or an op of your own) that takes a trainable parameter.

    Args:
        function: the function as the model calls it, e.g. `torch.nn.functional.prelu`; it must go through `__torch_function__`,
            as every function of torch does.
        per_example_grad: `(grad_output, position, args, kwargs) -> Tensor (B, *param.shape)`, the gradient of each example's loss
            in the tensor args[position]; `args` are plain tensors, examples in the first dimension of the others.
    """
    _USER[function] = per_example_grad


def fast_rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule that returns NotImplemented where it does not apply."""

    def add(rule: Rule) -> Rule:
        _FAST.update(dict.fromkeys(names, rule))
        return rule

    return add


def find(func: Callable, name: str) -> Rule:
    """The rule for an operation."""
    from grape_ray.engines import fast  # noqa: F401  (fills _FAST)

    if func in _USER:
        return _user
    if name in READS:
        return _read
    return _FAST.get(name, general)


def _read(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """Shapes, dtypes and the like; the value, where it is asked for, carries no gradient in torch either."""
    if name == "requires_grad":
        return True
    with _no_subclass():
        return func(*values_of(args), **values_of(kwargs))


def general(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    found = tracked_in(args, kwargs)
    if name in SAME_UP_TO_CAST:
        if not isinstance(args[0], Tracked):  # x.to(weight): the parameter is only a template
            return _read(session, func, name, args, kwargs)
        if args[0].node.root:
            return session.derive(func, args, kwargs, transposed=args[0].node.transposed)
    if name in ("t", "T", "mT", "transpose") and found[0].node.root and found[0].node.graph.ndim == 2:
        return session.derive(func, args, kwargs, transposed=not found[0].node.transposed)
    if name in BROADCASTS:
        return _broadcast(session, func, name, args, kwargs)
    derived = session.derive(func, args, kwargs)
    first = derived[0] if isinstance(derived, (tuple, list)) else derived
    if not isinstance(first, Tensor) or not session.batched(found, f"{name}.result", first.shape):
        return derived
    if name in ("expand", "repeat") and isinstance(args[0], Tracked):
        return _spread(session, name, args, kwargs, first.shape)
    if name == "matmul" and isinstance(args[0], Tracked) and args[1].ndim >= 3:
        return func(copies(session, args[0], first.ndim, 1), args[1])
    return _by_vmap(session, func, name, args, kwargs)


def copies(session: Session, value: Tracked, ndim: int, per_row: int) -> Tensor:
    """(B * per_row, ...) copies of a shared value with `ndim` dimensions, one (repeated per_row times) for each example."""
    shape = tuple(value.node.graph.shape)
    if len(shape) == ndim and shape[0] != 1:
        if session.rows == 1:  # the one example owns every row
            return ExpandTap.apply(session.anchor, session, value.node, (1, *shape)).view(shape)
        raise UnsupportedLayer(f"parameter {value.node.label}", f"shape {shape}", "one that broadcasts over the batch", "freeze it")
    own = ExpandTap.apply(session.anchor, session, value.node, (1,) * (ndim - len(shape)) + shape)
    if per_row == 1:
        return own
    return own.unsqueeze(1).expand(session.rows, per_row, *own.shape[1:]).flatten(0, 1)


def _broadcast(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    found = tracked_in(args, kwargs)
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    with _no_subclass():
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    if not session.batched(found, name, shape):
        return session.derive(func, args, kwargs)
    per_row = shape[0] // session.rows
    return func(*(copies(session, a, len(shape), per_row) if isinstance(a, Tracked) else a for a in args), **{
        k: copies(session, v, len(shape), per_row) if isinstance(v, Tracked) else v for k, v in kwargs.items()
    })  # fmt: skip


def _spread(session: Session, name: str, args: tuple, kwargs: dict, shape: torch.Size) -> Tensor:
    """`expand` and `repeat` along the batch: every example's copy is its own."""
    sizes = [*args[1:]] or list(kwargs.values())
    sizes = list(sizes[0]) if isinstance(sizes[0], (tuple, list)) else sizes
    own = copies(session, args[0], len(shape), shape[0] // session.rows)
    return own.expand(shape) if name == "expand" else own.repeat(1, *sizes[1:])


def _by_vmap(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """The operation on one example at a time, batched by vmap, each with its own copy of the parameter."""
    found = tracked_in(args, kwargs)
    batched: list[Tensor] = []

    def place(leaf: Any) -> Any:
        if isinstance(leaf, Tracked):
            batched.append(ExpandTap.apply(session.anchor, session, leaf.node, (1, *leaf.node.graph.shape)))
        elif isinstance(leaf, Tensor) and leaf.ndim and session.batched(found, f"{name}.argument", leaf.shape):
            batched.append(leaf.unflatten(0, (session.rows, -1)))
        else:
            return leaf
        return _Slot(len(batched) - 1)

    slots = tree_map(place, (args, kwargs))

    def one(*own: Tensor) -> Any:
        call_args, call_kwargs = tree_map(lambda s: own[s.number] if isinstance(s, _Slot) else s, slots)
        return func(*call_args, **call_kwargs)

    try:
        out = torch.vmap(one, randomness="different")(*batched)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UnsupportedLayer(
            f"operation '{name}' on trainable parameter {', '.join(t.node.label for t in found)}",
            str(error).splitlines()[0],
            "an operation with a rule, or one that torch.vmap can batch",
            "freeze the parameter (requires_grad=False) or teach it with grape_ray.register_rule",
        ) from error
    return tree_map(lambda t: t.flatten(0, 1) if isinstance(t, Tensor) else t, out)


class _Slot:
    """The place of a batched argument in a call."""

    def __init__(self, number: int):
        self.number = number


def _user(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """A registered operation: torch's own forward and input gradients, the user's per-example gradient."""
    from grape_ray.engines.taps import UserTap

    derived = session.derive(func, args, kwargs)
    if not session.batched(tracked_in(args, kwargs), f"{name}.result", derived.shape):
        return derived
    nodes = [a.node if isinstance(a, Tracked) else None for a in args]
    return UserTap.apply(session.anchor, session, func, _USER[func], nodes, values_of(kwargs), *values_of(args))
