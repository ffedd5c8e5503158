"""Copies of a shared value (`expand`, `repeat`, `tile`), as of a prefix token for every example: a
shared value again, which remembers whose copies it holds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grape_ray.engines.capture.by_vmap import by_vmap
from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.torch_functions import Call, Result
from grape_ray.engines.capture.tracked import Copies, Tracked

_EXPANDS = {"expand", "expand_as", "broadcast_to"}
COPIES = {*_EXPANDS, "repeat", "tile", "repeat_interleave"}


def copied(capture: CapturePass, call: Call) -> Result:
    """The result of an operation of `COPIES` on a tracked tensor."""
    value: Tracked = call.args[0]
    if call.name == "repeat_interleave" and isinstance(_repeats(call), Tensor):
        if capture.depends(call):
            return by_vmap(capture, call)
        return capture.derive(call.func, call.args, call.kwargs)
    shape = _expansion(call, list(value.node.graph.shape))
    out = capture.derive(call.func, call.args, call.kwargs)
    if shape is None:
        return out
    viewed, expanded = shape
    # only what is certain to be copies and nothing else
    if math.prod(expanded) == math.prod(out.node.graph.shape):
        source = value.node
        if call.name not in _EXPANDS:
            # repeat and tile expand a view with a dimension of 1 before each of the value's
            source = capture.derive(torch.reshape, (value, viewed), {}).node
        back = (torch.reshape, (tuple(out.node.graph.shape),), {})
        out.node.copies = Copies(source, tuple(expanded), (back,))
    return out


def _repeats(call: Call) -> Result:
    return call.kwargs.get("repeats", call.args[1] if len(call.args) > 1 else None)


def _sizes(call: Call) -> list[int]:
    """Sizes given one by one or as one sequence."""
    given = [*call.args[1:]] or [next(iter(call.kwargs.values()))]
    return list(given[0]) if isinstance(given[0], (tuple, list)) else given


def _expansion(call: Call, shape: list[int]) -> tuple[list[int], list[int]] | None:
    """The shape as which a value of `shape` is viewed, and the shape to which the view is then
    expanded before it is reshaped into the result; None where they are not known.
    """
    if call.name == "repeat_interleave":
        dim = call.kwargs.get("dim", call.args[2] if len(call.args) > 2 else None)
        if dim is None:
            return None
        before, after = shape[: dim % len(shape) + 1], shape[dim % len(shape) + 1 :]
        return [*before, 1, *after], [*before, _repeats(call), *after]
    if call.name == "expand_as":
        return shape, list(call.args[1].shape)
    sizes = _sizes(call)
    padded = [1] * (len(sizes) - len(shape)) + shape
    if call.name in _EXPANDS:
        return shape, [have if want == -1 else want for want, have in zip(sizes, padded)]
    times = [1] * (len(shape) - len(sizes)) + sizes  # of repeat and tile
    return (
        [n for size in padded for n in (1, size)],
        [n for pair in zip(times, padded) for n in pair],
    )
