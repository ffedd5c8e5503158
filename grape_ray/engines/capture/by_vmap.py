"""The way of last resort: an operation on one example at a time, batched by `torch.vmap`; exact for
whatever vmap can batch, and refused by name for the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.shared_values import expanded
from grape_ray.engines.capture.torch_functions import Call, Result
from grape_ray.engines.capture.tracked import Tracked, tracked_in, values_of
from grape_ray.errors import UnsupportedLayer


class _Slot:
    """The place of a batched argument in a call."""

    def __init__(self, number: int):
        self.number = number


def by_vmap(capture: CapturePass, call: Call) -> Result:
    """The result of a call whose arguments of the batch have the examples in dimension 0; each
    example gets its own copy of every parameter.

    Raises:
        UnsupportedLayer: vmap cannot batch it, or the result has another shape than the call's.
    """
    label = ", ".join(t.node.label for t in tracked_in(call.args, call.kwargs))
    batched: list[Tensor] = []

    def place(leaf: object) -> object:
        if isinstance(leaf, Tracked):
            shape = tuple(leaf.node.graph.shape)
            batched.append(expanded(capture, leaf.node, (capture.examples, *shape)))
        elif isinstance(leaf, Tensor) and not capture.shared_argument(leaf):
            if leaf.ndim == 0 or leaf.shape[0] % capture.examples:
                raise UnsupportedLayer(
                    f"operation '{call.name}' on parameter {label}",
                    f"an argument of shape {tuple(leaf.shape)} for {capture.examples} examples",
                    "a first dimension divisible by them",
                    "make it batch-first, freeze the parameter (requires_grad=False) or teach it"
                    " with grape_ray.register_rule",
                )
            # taken as batch-first; where it is not, the ownership check finds others' gradients
            batched.append(leaf.unflatten(0, (capture.examples, -1)))
        else:
            return leaf
        return _Slot(len(batched) - 1)

    slots = tree_map(place, (call.args, call.kwargs))

    def one(*own: Tensor) -> Result:
        args, kwargs = tree_map(lambda s: own[s.number] if isinstance(s, _Slot) else s, slots)
        return call.func(*args, **kwargs)

    try:
        # a draw of its own for each example, as the proof wants it
        out = torch.vmap(one, randomness="different")(*batched)
        out = tree_map(lambda t: t.flatten(0, 1) if isinstance(t, Tensor) else t, out)
        _check_shapes(out, call.func, call.args, call.kwargs)
        return out
    # vmap has no error of its own for what it cannot batch
    except (RuntimeError, ValueError, NotImplementedError, IndexError, TypeError) as error:
        raise UnsupportedLayer(
            f"operation '{call.name}' on trainable parameter {label}",
            str(error).splitlines()[0],
            "an operation with a rule, or one that torch.vmap can batch",
            "freeze the parameter (requires_grad=False) or teach it with grape_ray.register_rule",
        ) from error


def _check_shapes(out: object, func: Callable, args: tuple, kwargs: dict) -> None:
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
    for one, other in zip(tree_flatten(out)[0], tree_flatten(whole)[0]):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        if both and one.shape != other.shape:
            raise ValueError(
                f"shape {tuple(one.shape)} example by example, {tuple(other.shape)} for the batch"
            )
