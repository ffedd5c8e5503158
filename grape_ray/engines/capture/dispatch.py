"""Chooses what happens when an operation meets a tracked parameter.

In this order: a rule of the user's; reads that involve no gradient; a fast rule (linear, embedding,
convolution, layer norm, recurrent layers, attention); an operation in which the batch has no part,
whose result is shared; a broadcast or a placement, where every example gets its own copy of the
value; and last vmap over the examples, exact for whatever torch.func can batch. What none of them
can do is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from grape_ray.engines.capture.capture_pass import Phase, Session
from grape_ray.engines.capture.dependence import is_draw, is_dropout
from grape_ray.engines.capture.taps import expanded, inside, new_dims
from grape_ray.engines.capture.tracked import Spread, Tracked, no_subclass, tracked_in, values_of
from grape_ray.errors import UnsupportedLayer

Rule = Callable[[Session, Callable, str, tuple, dict], Any]

READS = {
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_leaf",
    "is_sparse", "is_quantized", "is_meta", "is_mps", "is_xpu", "is_nested", "itemsize", "nbytes",
    "names", "grad", "grad_fn", "data", "size", "dim", "ndimension", "numel", "nelement", "stride",
    "is_contiguous", "element_size", "len", "is_floating_point", "is_complex", "data_ptr",
    "get_device", "storage_offset", "repr", "format", "detach", "zeros_like", "ones_like",
    "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_empty",
    "new_full", "new_tensor", "is_pinned", "untyped_storage", "broadcast_shapes", "result_type",
    "requires_grad_", "is_same_size", "deepcopy", "hash", "is_inference", "is_grad",
}  # fmt: skip
SAME_UP_TO_CAST = {
    "to",
    "float",
    "double",
    "half",
    "bfloat16",
    "contiguous",
    "type",
    "type_as",
    "clone",
    "cuda",
    "cpu",
}
BROADCASTS = {
    "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "div", "truediv", "rdiv",
    "rtruediv", "itruediv", "pow", "rpow", "where", "maximum", "minimum", "lerp", "addcmul",
    "addcdiv", "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "subtract", "multiply", "divide",
    "copysign", "atan2", "fmax", "fmin", "hypot", "logaddexp", "xlogy", "remainder", "fmod",
}  # fmt: skip
PLACEMENTS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"}
WRITES = {"setitem", "copy", "index_put"}
RESHAPES = {
    "transpose", "permute", "view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "T",
    "mT", "t", "movedim", "swapaxes", "chunk", "split", "contiguous",
}  # fmt: skip
_USER: dict[Any, Callable] = {}
_FAST: dict[str, Rule] = {}


def register_rule(function: Callable, per_example_grad: Callable) -> None:
    """Teaches the engines a torch function (or an op of your own) that takes a trainable parameter.

    Args:
        function: the function as the model calls it, e.g. `torch.nn.functional.prelu`; it must go
            through `__torch_function__`, as every function of torch does.
        per_example_grad: `(grad_output, position, args, kwargs) -> Tensor (B, *param.shape)`, the
            gradient of each example's loss in the tensor args[position]; `args` are plain tensors,
            examples in the first dimension of the others.
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
    if func in _USER:
        return _user
    if name in READS:
        return _read
    return _FAST.get(name, general)


def _read(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """Shapes, dtypes and the like; the value, where it is asked for, carries no gradient in torch
    either.
    """
    if name == "requires_grad":
        return True
    with no_subclass():
        return func(*values_of(args), **values_of(kwargs))


def general(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    found = tracked_in(args, kwargs)
    if name in SAME_UP_TO_CAST:  # whatever else is there is a template of a type
        if not isinstance(args[0], Tracked):
            return _read(session, func, name, args, kwargs)
        out = session.derive(
            func, args, kwargs, transposed=args[0].node.transposed if args[0].node.root else None
        )
        if args[0].node.spread is not None and not any(isinstance(t, Tensor) for t in args[1:]):
            out.node.spread = args[0].node.spread.followed_by(func, args[1:], kwargs)
        return out
    if (
        name in ("t", "T", "mT", "transpose")
        and found[0].node.root
        and found[0].node.graph.ndim == 2
    ):
        return session.derive(func, args, kwargs, transposed=not found[0].node.transposed)
    if name in SPREADS and isinstance(args[0], Tracked):
        return _spread(session, func, name, args, kwargs)
    if not session.depends(name, args, kwargs):
        return shared(session, func, name, args, kwargs)
    if name in BROADCASTS:
        return _broadcast(session, func, args, kwargs)
    if name in PLACEMENTS:
        return func(*tree_map(lambda a: _own_as_it_is(session, a), args), **kwargs)
    if name in WRITES and not isinstance(args[0], Tracked):
        return _write(session, func, name, args, kwargs)
    if (
        name == "matmul"
        and isinstance(args[0], Tracked)
        and args[0].ndim == 2
        and not isinstance(args[1], Tracked)
        and args[1].ndim >= 3
    ):
        return func(own(session, args[0], (*args[1].shape[:-2], *args[0].shape)), args[1])
    if any(t.node.spread is not None for t in found):
        taken = tree_map(
            lambda a: (
                _own_as_it_is(session, a)
                if isinstance(a, Tracked) and a.node.spread is not None
                else a
            ),
            (args, kwargs),
        )
        return func(*taken[0], **taken[1])
    return _by_vmap(session, func, name, args, kwargs)


def shared(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """An operation in which the batch has no part. Raises UnsupportedLayer where it draws at
    random, once for all examples.
    """
    first = args[0] if args else None
    if is_draw(name) or is_dropout(name, args, kwargs):
        raise UnsupportedLayer(
            f"`{name}` on parameter {', '.join(t.node.label for t in tracked_in(args, kwargs))}",
            "one random draw that all examples of a pass share",
            "a draw of its own for each example",
            "apply it to activations, or set its probability to 0",
        )
    out = session.derive(func, args, kwargs)
    if (
        name in RESHAPES
        and isinstance(first, Tracked)
        and first.node.spread is not None
        and isinstance(out, Tracked)
    ):
        out.node.spread = first.node.spread.followed_by(func, args[1:], kwargs)
    return out


def own(session: Session, value: Tracked, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """A shared value where it meets a tensor of the batch of `shape`: as plain values with a
    gradient of its own for each example.

    The batch lies along the dimensions to which the value is expanded, or inside the value
    (positions that were made for every example). Its sizes suggest which; verification by value
    decides, and then `session.inside` says so.
    """
    node, shape = value.node, tuple(shape)
    if node.spread is not None and tuple(node.graph.shape) == shape:
        out = expanded(session, node.spread.source, node.spread.shape)
        for func, args, kwargs in node.spread.then:
            out = func(out, *args, **kwargs)
        return out
    way = len(session.taps), tuple(node.graph.shape), shape
    along = any(shape[d] % session.rows == 0 for d in new_dims(node, shape))
    if node.graph.ndim and along == (way in session.inside):
        out = inside(session, node)
    else:
        out = expanded(session, node, shape)
    if session.taps and session.phase is Phase.FORWARD:
        session.taps[-1].way = way
    return out


def _own_as_it_is(session: Session, leaf: Any) -> Any:
    return own(session, leaf, leaf.node.graph.shape) if isinstance(leaf, Tracked) else leaf


def _broadcast(session: Session, func: Callable, args: tuple, kwargs: dict) -> Any:
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    with no_subclass():
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    return func(*(own(session, a, shape) if isinstance(a, Tracked) else a for a in args), **{
        k: own(session, v, shape) if isinstance(v, Tracked) else v for k, v in kwargs.items()
    })  # fmt: skip


def _write(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """A shared value written to places of a tensor: each place has a copy of its own."""
    into, values = args[0], args[2] if name != "copy" else args[1]
    if not isinstance(values, Tracked):
        return _by_vmap(session, func, name, args, kwargs)
    region = into if name == "copy" else into.detach()[args[1]]
    values = own(session, values, region.shape)
    return (
        func(into, values, *args[2:], **kwargs)
        if name == "copy"
        else func(into, args[1], values, *args[3:], **kwargs)
    )


def _sizes(args: tuple, kwargs: dict) -> list[int]:
    """Sizes given one by one or as one sequence."""
    given = [*args[1:]] or [next(iter(kwargs.values()))]
    return list(given[0]) if isinstance(given[0], (tuple, list)) else given


def _expansion(name: str, shape: list[int], args: tuple, kwargs: dict) -> list[int] | None:
    """The shape to which a value of `shape` is expanded before it is reshaped into the result; None
    where it is not known.
    """
    if name in ("expand", "broadcast_to"):
        sizes = _sizes(args, kwargs)
        padded = [1] * (len(sizes) - len(shape)) + shape
        return [have if want == -1 else want for want, have in zip(sizes, padded)]
    if name == "expand_as":
        return list(args[1].shape)
    return None


def _spread(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """Copies of a shared value, which is itself again a shared value that remembers whose copies it
    holds.
    """
    value: Tracked = args[0]
    source, shape = value.node, list(value.node.graph.shape)
    if name == "repeat_interleave":
        repeats = kwargs.get("repeats", args[1] if len(args) > 1 else None)
        if isinstance(repeats, Tensor):
            if session.depends(name, args, kwargs):
                return _by_vmap(session, func, name, args, kwargs)
            return session.derive(func, args, kwargs)
        dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
        inner = viewed = None
        if dim is not None:
            dim %= len(shape)
            inner, viewed = (
                [*shape[: dim + 1], repeats, *shape[dim + 1 :]],
                [*shape[: dim + 1], 1, *shape[dim + 1 :]],
            )
    elif name in ("repeat", "tile"):
        times = _sizes(args, kwargs)
        times = [1] * (len(shape) - len(times)) + times
        padded = [1] * (len(times) - len(shape)) + shape
        inner = [n for pair in zip(times, padded) for n in pair]
        viewed = [n for size in padded for n in (1, size)]
    else:
        inner = viewed = _expansion(name, shape, args, kwargs)
    out = session.derive(func, args, kwargs)
    if (
        inner is not None
        and viewed is not None
        and math.prod(inner) == math.prod(out.node.graph.shape)
    ):
        if name not in ("expand", "broadcast_to", "expand_as"):
            source = session.derive(torch.reshape, (value, viewed), {}).node
        out.node.spread = Spread(
            source, tuple(inner), ((torch.reshape, (tuple(out.node.graph.shape),), {}),)
        )
    return out


SPREADS = {"expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave"}


def _by_vmap(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """The operation on one example at a time, batched by vmap, each with its own copy of the
    parameter.
    """
    found = tracked_in(args, kwargs)
    label = ", ".join(t.node.label for t in found)
    batched: list[Tensor] = []

    def place(leaf: Any) -> Any:
        if isinstance(leaf, Tracked):
            shape = tuple(leaf.node.graph.shape)
            batched.append(expanded(session, leaf.node, (session.rows, *shape)))
        elif isinstance(leaf, Tensor) and not session.shared_argument(leaf):
            if leaf.ndim == 0 or leaf.shape[0] % session.rows:
                raise UnsupportedLayer(
                    f"operation '{name}' on parameter {label}",
                    f"an argument of shape {tuple(leaf.shape)} for {session.rows} examples",
                    "a first dimension divisible by them",
                    "make it batch-first, freeze the parameter (requires_grad=False) or teach it"
                    " with grape_ray.register_rule",
                )
            batched.append(leaf.unflatten(0, (session.rows, -1)))
        else:
            return leaf
        return _Slot(len(batched) - 1)

    slots = tree_map(place, (args, kwargs))

    def one(*own: Tensor) -> Any:
        call_args, call_kwargs = tree_map(
            lambda s: own[s.number] if isinstance(s, _Slot) else s, slots
        )
        return func(*call_args, **call_kwargs)

    try:
        out = torch.vmap(one, randomness="different")(*batched)
        out = tree_map(lambda t: t.flatten(0, 1) if isinstance(t, Tensor) else t, out)
        _check_shapes(out, func, args, kwargs)
        return out
    except (RuntimeError, ValueError, NotImplementedError, IndexError, TypeError) as error:
        raise UnsupportedLayer(
            f"operation '{name}' on trainable parameter {label}",
            str(error).splitlines()[0],
            "an operation with a rule, or one that torch.vmap can batch",
            "freeze the parameter (requires_grad=False) or teach it with grape_ray.register_rule",
        ) from error


def _check_shapes(out: Any, func: Callable, args: tuple, kwargs: dict) -> None:
    """Raises ValueError where an operation by example has another shape than the operation, which
    is asked without computing it.
    """
    try:
        meta = tree_map(
            lambda t: torch.empty_like(t, device="meta") if isinstance(t, Tensor) else t,
            values_of((args, kwargs)),
        )
        whole = func(*meta[0], **meta[1])
    except (RuntimeError, NotImplementedError):  # it has no shapes without values
        return
    pairs = zip(tree_flatten(out)[0], tree_flatten(whole)[0])
    wrong = next(
        (
            (a.shape, b.shape)
            for a, b in pairs
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape
        ),
        None,
    )
    if wrong is not None:
        raise ValueError(
            f"shape {tuple(wrong[0])} example by example, {tuple(wrong[1])} for the batch"
        )


class _Slot:
    """The place of a batched argument in a call."""

    def __init__(self, number: int):
        self.number = number


def _user(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """A registered operation: torch's own forward and input gradients, the user's per-example
    gradient.
    """
    from grape_ray.engines.capture.taps import UserTap

    if not session.depends(name, args, kwargs):
        return session.derive(func, args, kwargs)
    nodes = [a.node if isinstance(a, Tracked) else None for a in args]
    tap = session.tap(nodes, name, (session.rows,))
    return UserTap.apply(
        session.anchor, session, tap, func, _USER[func], nodes, values_of(kwargs), *values_of(args)
    )
