"""Where a value that all examples share meets the batch: from there on each example has a gradient
of its own.

The batch lies along the dimensions to which the value is expanded, or inside the value (positions
that were made for every example). Its sizes suggest which; verification by value decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.rule import Rule, Saved, Settings
from grape_ray.engines.capture.tap import Phase
from grape_ray.engines.capture.tap_function import apply_rule
from grape_ray.engines.capture.tracked import Node, Tracked


def _rows_first(grad: Tensor, position: int, saved: Saved, settings: Settings) -> Tensor:
    """The gradient with the dimensions of the expansion in front."""
    lead = settings["lead"]
    return grad.permute(*lead, *(d for d in range(grad.ndim) if d not in lead))


# a value expanded to a shape, whose gradient is split by example before it is summed
_EXPAND = Rule(
    forward=lambda args, settings: (args[0].expand(settings["shape"]), ()),
    gradient=_rows_first,
    lead_of="gradient",
)
# a value as it is, whose rows belong to examples
_OWN_ROWS = Rule(
    # a Function that returns its argument would return a view of it
    forward=lambda args, settings: (args[0].clone(), ()),
    gradient=lambda grad, position, saved, settings: grad,
    per_row=True,
)


def expanded(capture: CapturePass, node: Node, shape: tuple[int, ...]) -> Tensor:
    """The value of a node expanded to `shape`, as a plain tensor with a gradient of its own for
    each example.
    """
    lead = new_dims(node, shape)
    settings = {"shape": shape, "lead": lead}
    return apply_rule(capture, _EXPAND, "expand", [node], [shape[d] for d in lead], settings)


def new_dims(node: Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions of `shape` along which a value is repeated."""
    extra = len(shape) - node.graph.ndim
    have = (1,) * extra + tuple(node.graph.shape)
    return tuple(
        d
        for d, (want, size) in enumerate(zip(shape, have))
        if size == 1 and (want != 1 or d < extra)
    )


def _own_rows(capture: CapturePass, node: Node) -> Tensor:
    """The value of a node as it is, as a plain tensor whose rows are those of examples."""
    if node.look_up is not None:
        return node.look_up(capture)
    return apply_rule(capture, _OWN_ROWS, "inside", [node], node.graph.shape)


def per_example(
    capture: CapturePass, value: Tracked, shape: tuple[int, ...] | torch.Size
) -> Tensor:
    """A shared value where it meets a tensor of the batch of `shape`: as plain values with a
    gradient of its own for each example.
    """
    node, shape = value.node, tuple(shape)
    if node.copies is not None and tuple(node.graph.shape) == shape:
        out = expanded(capture, node.copies.source, node.copies.shape)
        for func, args, kwargs in node.copies.then:
            out = func(out, *args, **kwargs)
        return out
    site = len(capture.taps), tuple(node.graph.shape), shape
    along = any(shape[d] % capture.examples == 0 for d in new_dims(node, shape))
    # what the sizes suggest, or the opposite where its gradients have shown it to be wrong
    if node.graph.ndim and along == (site in capture.inner_sites):
        out = _own_rows(capture, node)
    else:
        out = expanded(capture, node, shape)
    # a tap that turns out wrong says which guess to revise
    if capture.taps and capture.phase is Phase.FORWARD:
        capture.taps[-1].site = site
    return out


def per_example_as_is(capture: CapturePass, leaf: object) -> object:
    """A shared value where it meets the batch in its own shape; all else unchanged."""
    return per_example(capture, leaf, leaf.node.graph.shape) if isinstance(leaf, Tracked) else leaf
