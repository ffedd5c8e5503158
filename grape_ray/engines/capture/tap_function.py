"""The one autograd Function that catches per-example gradients, for every rule.

A rule (`capture.rule`) knows its operation and nothing else. The tap saves for backward, casts as
autocast would, keeps the projection of an input instead of the input, asks which rows belong to
which example, and hands each example's part to the collector. No dense gradient of a weight is
formed.

Shapes: B examples, T positions, I in, O out, *lead the dimensions along which the examples lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from grape_ray.engines.algebra.factor_pairs import Index, outer
from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.rule import Rule, Settings
from grape_ray.engines.capture.tap import Tap
from grape_ray.engines.capture.tracked import Node, Tracked
from grape_ray.engines.precision import autocast_dtype, without_autocast
from grape_ray.errors import UnsupportedLayer

_HALF = (torch.float16, torch.bfloat16)


class _Context(Protocol):
    """What one call of the Function keeps from forward to backward: torch's own context, and on it
    the tap's attributes.

    Attributes:
        dtype: of the input before any cast. others: what is saved and is no tensor.
        projected: whether the input's projection was kept in its place. axis: the side of the
            weight on which the input lies.
    """

    capture: CapturePass
    tap: Tap
    rule: Rule
    nodes: tuple[Node | None, ...]
    settings: Settings
    dtype: torch.dtype | None
    others: list[Any]
    projected: bool
    axis: int
    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def apply_rule(
    capture: CapturePass,
    rule: Rule,
    name: str,
    args: Sequence[object],
    lead: Sequence[int],
    settings: Settings | None = None,
) -> Tensor:
    """The result of an operation whose arguments are of the batch, or are tracked parameters.

    Args:
        args: tensors, Nodes and tracked tensors, and whatever else the rule's forward takes. lead:
            the sizes of the leading dimensions of the gradients that will arrive.
    """
    nodes = tuple(
        arg if isinstance(arg, Node) else arg.node if isinstance(arg, Tracked) else None
        for arg in args
    )
    tap = capture.tap(nodes, name, lead)
    values = [arg if node is None else node.value for node, arg in zip(nodes, args)]
    return _TapFunction.apply(capture.dummy, capture, tap, rule, nodes, settings or {}, *values)


class _TapFunction(torch.autograd.Function):
    """An operation on parameters; backward gives the inputs' gradients to autograd, and the
    parameters' to the collector, example by example.

    `dummy` is a scalar that needs a gradient, so that backward comes here even where no input needs
    one.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        dummy: Tensor,
        capture: CapturePass,
        tap: Tap,
        rule: Rule,
        nodes: tuple[Node | None, ...],
        settings: Settings,
        *args: Any,
    ) -> Tensor:
        ctx.capture, ctx.tap, ctx.rule = capture, tap, rule
        ctx.nodes, ctx.settings = nodes, settings
        ctx.dtype = getattr(args[0], "dtype", None)
        if rule.casts:
            # here, so that what is kept for backward is what was computed with
            args = _as_under_autocast(args)
            # verification then allows for more rounding
            capture.half |= args[0].dtype in _HALF
        out, saved = rule.forward(args, settings)
        kept = _keep(ctx, args[0]) if rule.factors is not None else None
        saved = (kept, *saved)
        # by torch, so that its hooks (offloading, checkpointing) see them
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in saved))
        ctx.others = [None if isinstance(value, Tensor) else value for value in saved]
        return out

    @staticmethod
    def backward(ctx: _Context, grad: Tensor):  # type: ignore[override]
        kept, *saved = (
            other if tensor is None else tensor
            for tensor, other in zip(ctx.saved_tensors, ctx.others)
        )
        if ctx.rule.factors is not None:
            _deliver_factors(ctx, grad, kept)
        else:
            _deliver_gradients(ctx, grad, tuple(saved))
        wanted = ctx.needs_input_grad[6:]  # of `args`: six arguments of forward come before them
        grads: list[Tensor | None] = [None] * len(wanted)
        if ctx.rule.input_gradient is None:
            grads = _input_gradients_by_torch(ctx, grad, saved, wanted)
        elif wanted[0]:
            found = ctx.rule.input_gradient(grad, tuple(saved), ctx.settings)
            grads[0] = found.to(ctx.dtype)
        return None, None, None, None, None, None, *grads


def _as_under_autocast(args: tuple) -> tuple:
    """The arguments as autocast would pass them to a matrix product."""
    dtype = autocast_dtype(args[0].device.type)
    if dtype is None:
        return args
    return tuple(
        arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg
        for arg in args
    )


def _keep(ctx: _Context, x: Tensor) -> Tensor | None:
    """What forward keeps of the input for the weight's gradient: on a compressed side its
    projection (*lead, R), so that x itself is freed.
    """
    rule, node, collector = ctx.rule, ctx.nodes[1], ctx.capture.collector
    ctx.projected = False
    if node is None:
        return None
    # the side of the parameter on which x lies; 1 is the last
    ctx.axis = int(rule.outputs_first != node.transposed)
    if not (rule.project and node.root and collector.compresses(node.root, ctx.axis)):
        return x
    ctx.projected = True
    matrix, device = collector.matrix(node.root, x), x.device.type
    if autocast_dtype(device) is None:  # to enter its context takes longer than to ask
        return rule.project(x, matrix, ctx.settings)
    # never in the lower precision of an autocast around the engine
    with without_autocast(device):
        return rule.project(x, matrix, ctx.settings)


def _deliver_factors(ctx: _Context, grad: Tensor, kept: Tensor | None) -> None:
    """Gives the collector one use of a weight, of its bias, or of both."""
    capture, rule = ctx.capture, ctx.rule
    if not capture.arriving(ctx.tap, grad):
        return
    assert rule.factors is not None
    outputs, inputs = rule.factors(grad, None if ctx.projected else kept, ctx.settings)
    # read once for weight and bias; of a rearranged gradient the sum alone is cheaper
    together = outputs is grad
    outputs = _by_example(ctx, outputs)
    inputs = _by_example(ctx, kept if ctx.projected else inputs)
    weight, bias = (*ctx.nodes[1:], None)[:2]
    weight_name, bias_name = (node.root if node is not None else None for node in (weight, bias))
    if weight_name and bias_name and ctx.axis and together:
        capture.collector.affine(weight_name, bias_name, outputs, inputs)
        return
    if bias is not None:
        capture.dense(bias, outputs.sum(1))
    # of a pair the left side alone may be one-hot
    if weight_name and not (ctx.axis and isinstance(inputs, Index)):
        pair = (outputs, inputs) if ctx.axis else (inputs, outputs)
        capture.collector.pair(weight_name, *pair)
    elif weight is not None:  # a computed weight, as it was used
        pair: Any = (outputs, inputs) if rule.outputs_first else (inputs, outputs)
        capture.dense(weight, outer(*pair))


def _by_example(ctx: _Context, factor: Any) -> Any:
    """(*lead, *positions, D) -> (B, T, D), of one-hot factors their ids; None stays None."""
    if isinstance(factor, Index):
        return Index(ctx.capture.by_example(ctx.tap, factor.ids), factor.size)
    return factor if factor is None else ctx.capture.by_example(ctx.tap, factor).flatten(1, -2)


def _deliver_gradients(ctx: _Context, grad: Tensor, saved: tuple) -> None:
    """Gives the collector each example's gradient of every parameter."""
    capture, tap, rule, lead = ctx.capture, ctx.tap, ctx.rule, len(ctx.tap.lead)
    gradient_of = rule.gradient
    assert gradient_of is not None

    def found() -> list[tuple[Node, Tensor]]:
        return [
            (node, gradient_of(grad, position, saved, ctx.settings))
            for position, node in enumerate(ctx.nodes)
            if node is not None
        ]

    rows, gradients = grad, None
    if rule.lead_of == "gradient":
        gradients = found()
        parts = [gradient for _, gradient in gradients]
        rows = parts[0] if len(parts) == 1 else torch.cat([p.flatten(lead) for p in parts], lead)
    if not capture.arriving(tap, rows):
        return
    for node, gradient in found() if gradients is None else gradients:
        if rule.per_row:
            assert tap.layout is not None
            own = tap.layout.own_rows(gradient, capture.examples)
        else:
            own = capture.summed(tap, gradient)
        # a rule that a user registered may return anything
        if own.numel() != capture.examples * node.graph.numel():
            raise UnsupportedLayer(
                f"the rule of operation '{tap.key[1]}' on parameter {node.label}",
                f"a gradient of shape {tuple(gradient.shape)}",
                f"rows of examples, of shape {tuple(node.graph.shape)} each",
            )
        capture.dense(node, own.reshape(capture.examples, *node.graph.shape))


def _input_gradients_by_torch(
    ctx: _Context, grad: Tensor, args: list, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the arguments that need one, by computing the operation again."""
    grads: list[Tensor | None] = [None] * len(wanted)
    positions = [position for position, want in enumerate(wanted) if want]
    if positions:
        with torch.enable_grad():
            fresh = [
                arg.detach().requires_grad_(position in positions)
                if isinstance(arg, Tensor)
                else arg
                for position, arg in enumerate(args)
            ]
            out, _ = ctx.rule.forward(tuple(fresh), ctx.settings)
            found = torch.autograd.grad(out, [fresh[p] for p in positions], grad)
        for position, gradient in zip(positions, found):
            grads[position] = gradient
    return grads
