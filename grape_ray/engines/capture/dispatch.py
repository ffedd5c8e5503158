"""Chooses what happens when an operation meets a tracked parameter.

In this order: a handler from the table that the pass was given, keyed by function object (linear,
embedding, convolution, normalisation, recurrent layers, attention, and what a user registered);
reads that involve no gradient; an operation in which the batch has no part, whose result is shared;
a broadcast or a placement, where every example gets its own copy of the value; and last vmap over
the examples. What none of them can do is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from grape_ray.engines.capture.by_vmap import by_vmap
from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.copies import COPIES, copied
from grape_ray.engines.capture.draws import is_draw, is_dropout
from grape_ray.engines.capture.shared_values import per_example, per_example_as_is
from grape_ray.engines.capture.torch_functions import Call, Result, is_in_place, public
from grape_ray.engines.capture.tracked import Tracked, no_subclass, tracked_in, values_of
from grape_ray.errors import UnsupportedLayer

Handler = Callable[[CapturePass, Call], object]

# Operations by their names as `torch_functions.operation` gives them: torch's own alone.
READS = {
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_leaf",
    "is_sparse", "is_quantized", "is_meta", "is_mps", "is_xpu", "is_nested", "itemsize", "nbytes",
    "names", "grad", "grad_fn", "data", "size", "dim", "ndimension", "numel", "nelement", "stride",
    "is_contiguous", "element_size", "len", "is_floating_point", "is_complex", "data_ptr",
    "get_device", "storage_offset", "repr", "format", "detach", "zeros_like", "ones_like",
    "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_empty",
    "new_full", "new_tensor", "is_pinned", "untyped_storage", "broadcast_shapes", "result_type",
    "is_same_size", "deepcopy", "hash", "is_inference",
}  # fmt: skip
CASTS = {
    "to", "float", "double", "half", "bfloat16", "contiguous", "type", "type_as", "clone", "cuda",
    "cpu",
}  # fmt: skip
TRANSPOSES = {"t", "T", "mT", "transpose"}
BROADCASTS = {
    "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "div", "truediv", "rdiv",
    "pow", "rpow", "where", "maximum", "minimum", "lerp", "addcmul", "addcdiv", "eq",
    "ne", "lt", "le", "gt", "ge", "subtract", "multiply", "divide", "copysign", "atan2", "fmax",
    "fmin", "hypot", "logaddexp", "xlogy", "remainder", "fmod",
}  # fmt: skip
PLACEMENTS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"}
WRITES = {"setitem", "copy", "index_put"}
RESHAPES = {
    "transpose", "permute", "view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "T",
    "mT", "t", "movedim", "swapaxes", "chunk", "split", "contiguous",
}  # fmt: skip


def dispatch(handlers: Mapping[Callable, Handler], capture: CapturePass, call: Call) -> Result:
    """The result of a call with at least one tracked argument."""
    handler = handlers.get(call.func) or handlers.get(public(call.func))
    if handler is not None:
        return handler(capture, call)
    if call.name in READS:
        return _read(call)
    return general(capture, call)


def _read(call: Call) -> Result:
    """Shapes, dtypes and the like; the value, where it is asked for, carries no gradient in torch
    either.
    """
    if call.name == "requires_grad":
        return True
    with no_subclass():
        return call.func(*values_of(call.args), **values_of(call.kwargs))


def general(capture: CapturePass, call: Call) -> Result:
    """The result of a call for which no handler is known, or to which its handler does not
    apply.
    """
    func, name, args, kwargs = call
    first = args[0] if args else None
    node = first.node if isinstance(first, Tracked) else None
    if name in CASTS:
        return _cast(capture, call)
    # still the parameter, so that a product with it keeps its gradient a pair of factors
    if name in TRANSPOSES and node is not None and node.root and node.graph.ndim == 2:
        return capture.derive(func, args, kwargs, transposed=not node.transposed)
    if name in COPIES and node is not None:
        return copied(capture, call)
    if not capture.depends(call):
        return shared(capture, call)
    if name == "masked_fill":
        return _masked_fill(capture, call)
    if name in BROADCASTS:
        return _broadcast(capture, call)
    if name in PLACEMENTS:
        args, kwargs = tree_map(lambda a: per_example_as_is(capture, a), (args, kwargs))
        return func(*args, **kwargs)
    if name in WRITES and node is None:
        return _write(capture, call)
    # one copy of the matrix for each of the batch's, as torch broadcasts it
    if name == "matmul" and node is not None and _of_many_matrices(args):
        return func(per_example(capture, args[0], (*args[1].shape[:-2], *args[0].shape)), args[1])
    # plain tensors from here on: each copy's gradient is split by example, whatever the operation
    if any(t.node.copies is not None for t in tracked_in(args, kwargs)):
        args, kwargs = tree_map(
            lambda a: (
                per_example_as_is(capture, a)
                if isinstance(a, Tracked) and a.node.copies is not None
                else a
            ),
            (args, kwargs),
        )
        return func(*args, **kwargs)
    return by_vmap(capture, call)


def _cast(capture: CapturePass, call: Call) -> Result:
    """A value of another type or device; whatever else is among the arguments is a template of a
    type.
    """
    func, _, args, kwargs = call
    if not args:  # torch.clone(input=value)
        args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        call = call._replace(args=args, kwargs=kwargs)
    if not isinstance(args[0], Tracked):
        return _read(call)
    node = args[0].node
    out = capture.derive(func, args, kwargs, transposed=node.transposed if node.root else None)
    if node.copies is not None and not any(isinstance(t, Tensor) for t in args[1:]):
        out.node.copies = node.copies.followed_by(func, args[1:], kwargs)
    return out


def _of_many_matrices(args: tuple) -> bool:
    """Whether a shared matrix is multiplied with several of the batch's."""
    return args[0].ndim == 2 and not isinstance(args[1], Tracked) and args[1].ndim >= 3


def shared(capture: CapturePass, call: Call) -> Result:
    """An operation in which the batch has no part. Raises UnsupportedLayer where it draws at
    random, once for all examples.
    """
    func, name, args, kwargs = call
    first = args[0] if args else None
    if is_draw(name) or is_dropout(name, args, kwargs):
        raise UnsupportedLayer(
            f"`{name}` on parameter {', '.join(t.node.label for t in tracked_in(args, kwargs))}",
            "one random draw that all examples of a pass share",
            "a draw of its own for each example",
            "apply it to activations, or set its probability to 0",
        )
    out = capture.derive(func, args, kwargs)
    if (
        name in RESHAPES
        and isinstance(first, Tracked)
        and first.node.copies is not None
        and isinstance(out, Tracked)
    ):
        out.node.copies = first.node.copies.followed_by(func, args[1:], kwargs)
    return out


def _broadcast(capture: CapturePass, call: Call) -> Result:
    """An operation whose arguments are broadcast against one another."""
    tensors = [t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor)]
    with no_subclass():
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))

    def each(value: object) -> object:
        return per_example(capture, value, shape) if isinstance(value, Tracked) else value

    return call.func(*map(each, call.args), **{k: each(v) for k, v in call.kwargs.items()})


def _masked_fill(capture: CapturePass, call: Call) -> Result:
    """A shared number at masked places: torch takes one number alone, and not one an example."""
    given = dict(zip(("input", "mask", "value"), call.args)) | call.kwargs
    x = given["input"] if "input" in given else given["self"]
    out = torch.where(given["mask"], given["value"], x)
    return x.copy_(out) if is_in_place(call.func) else out


def _write(capture: CapturePass, call: Call) -> Result:
    """A shared value written to places of a tensor: each place has a copy of its own."""
    func, name, args, kwargs = call
    position = 1 if name == "copy" else 2
    if len(args) <= position or not isinstance(args[position], Tracked):
        return by_vmap(capture, call)
    # for its shape alone
    region = args[0] if name == "copy" else args[0].detach()[args[1]]
    values = per_example(capture, args[position], region.shape)
    return func(*args[:position], values, *args[position + 1 :], **kwargs)
