"""Autograd functions that return the input's gradient and hand (activation, output gradient) to the sink: no dense weight gradient.

Shapes: B examples, T positions, I in, O out. Each tap takes the session's anchor first, so that backward reaches it even where no
input needs a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grape_ray.engines.tracked import Node, Session
from grape_ray.rules.pairs import Index


def _cast(*tensors: Tensor | None) -> list[Any]:
    """The tensors as autocast would pass them to a matrix product."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


def per_example(x: Tensor, rows: int) -> Tensor:
    """(rows * k, ..., D) as (rows, positions, D), batch-major."""
    return x.reshape(rows, -1, x.shape[-1]) if x.ndim != 3 or x.shape[0] != rows else x


class ExpandTap(torch.autograd.Function):
    """Gives every example its own copy of a shared value: the copy's gradient is the per-example gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, session: Session, node: Node, shape: tuple[int, ...]) -> Tensor:
        ctx.session, ctx.node = session, node
        session.announce(node)
        return node.value.view(shape).expand(session.rows, *shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        ctx.session.dense(ctx.node, grad.reshape(ctx.session.rows, *ctx.node.graph.shape))
        return None, None, None, None


class MatrixTap(torch.autograd.Function):
    """x W^T + b (`by_rows`, as nn.Linear) or x W + b; x is (B * k, ..., I), of which the sink decides what is kept."""

    @staticmethod
    def forward(ctx: Any, anchor, session: Session, x, weight, bias, weight_node: Node | None, bias_node: Node | None, by_rows: bool):
        dtype = x.dtype
        x, weight, bias = _cast(x, weight, bias)
        ctx.session, ctx.nodes, ctx.by_rows, ctx.dtype = session, (weight_node, bias_node), by_rows, dtype
        session.announce(weight_node, bias_node)
        kept = None
        if weight_node is not None:
            ctx.axis = int(by_rows != weight_node.transposed)  # the parameter's axis on which x lies
            kept = per_example(x, session.rows)
            if weight_node.root:
                kept = session.sink.keep(weight_node.root, ctx.axis, kept)
        ctx.save_for_backward(kept, weight)
        return F.linear(x, weight if by_rows else weight.T, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        kept, weight = ctx.saved_tensors
        weight_node, bias_node = ctx.nodes
        grad3 = per_example(grad, ctx.session.rows)
        _hand_over(ctx, weight_node, bias_node, grad3, kept)
        grad_x = (grad @ (weight if ctx.by_rows else weight.T)).to(ctx.dtype) if ctx.needs_input_grad[2] else None
        return None, None, grad_x, None, None, None, None, None


def _hand_over(ctx: Any, weight_node: Node | None, bias_node: Node | None, grad: Tensor, kept: Tensor | None) -> None:
    """Tells the sink of one use of a weight and its bias; grad (B,T,O), kept (B,T,I) or projected (B,T,R)."""
    sink = ctx.session.sink
    weight, bias = (node.root if node is not None else None for node in (weight_node, bias_node))
    if weight and bias and ctx.axis and kept is not None:
        sink.affine(weight, bias, grad, kept)
        return
    if bias_node is not None:
        ctx.session.dense(bias_node, grad.sum(1))
    if weight and kept is not None:
        sink.pair(weight, *((grad, kept) if ctx.axis else (kept, grad)))
    elif weight_node is not None and kept is not None:
        left, right = (grad, kept) if ctx.by_rows else (kept, grad)
        ctx.session.dense(weight_node, torch.bmm(left.transpose(1, 2), right))


class EmbeddingTap(torch.autograd.Function):
    """Rows of a table by integer ids of shape (B * k, ...); rows at `padding_idx` get no gradient, as in torch."""

    @staticmethod
    def forward(ctx: Any, anchor, session: Session, ids, weight, node: Node, padding_idx: int | None):
        ctx.session, ctx.node, ctx.padding_idx = session, node, padding_idx
        session.announce(node)
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        rows, table = ctx.session.rows, ctx.node.graph
        ids2, grad3 = ids.reshape(rows, -1), grad.reshape(rows, -1, grad.shape[-1])
        if ctx.padding_idx is not None:
            grad3 = grad3.masked_fill((ids2 == ctx.padding_idx % table.shape[0]).unsqueeze(-1), 0)
        index = Index(ids2, table.shape[0])
        if ctx.node.root and not ctx.node.transposed:
            ctx.session.sink.pair(ctx.node.root, index, grad3)
        else:
            ctx.session.dense(ctx.node, index.outer(grad3))
        return None, None, None, None, None, None


class NormTap(torch.autograd.Function):
    """Layer normalisation over the last dimensions, with per-example gradients of scale and shift."""

    @staticmethod
    def forward(ctx: Any, anchor, session: Session, x, shape, weight, bias, nodes: tuple[Node | None, Node | None], eps: float):
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.session, ctx.nodes, ctx.shape = session, nodes, shape
        session.announce(*nodes)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        from grape_ray.rules.norm import scale_and_shift

        x, mean, rstd, weight, bias = ctx.saved_tensors
        weight_node, bias_node = ctx.nodes
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
        )[0]  # fmt: skip
        scale, shift = scale_and_shift(x, grad, mean, rstd, ctx.session.rows, len(ctx.shape), weight_node is not None)
        if weight_node is not None and scale is not None:
            ctx.session.dense(weight_node, scale.view(-1, *ctx.shape))
        if bias_node is not None:
            ctx.session.dense(bias_node, shift.view(-1, *ctx.shape))
        return None, None, grad_x, None, None, None, None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, spec: tuple) -> Tensor:
    stride, padding, dilation = spec
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), 1)


class ConvTap(torch.autograd.Function):
    """A convolution (groups=1), seen as a matrix (O, C * kernel) over patches; the sink decides what is kept of the input."""

    @staticmethod
    def forward(ctx: Any, anchor, session: Session, x, weight, bias, weight_node: Node | None, bias_node: Node | None, spec: tuple):
        dtype = x.dtype
        x, weight, bias = _cast(x, weight, bias)
        ctx.session, ctx.nodes, ctx.spec, ctx.dtype = session, (weight_node, bias_node), spec, dtype
        session.announce(weight_node, bias_node)
        ctx.projected, kept = False, None
        if weight_node is not None and session.sink.compresses(weight_node.root, 1):
            ctx.projected = True  # projecting patches is a convolution with the projection's columns as filters
            filters = session.sink.matrix(weight_node.root, x).T.reshape(-1, *weight.shape[1:])
            kept = per_example(_convolve(x, filters, None, spec).flatten(2).transpose(1, 2), session.rows)
        elif weight_node is not None:
            kept = x
        ctx.x_shape = x.shape
        ctx.save_for_backward(kept, weight)
        return _convolve(x, weight, bias, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        from grape_ray.rules.conv import patches

        kept, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.spec
        weight_node, bias_node = ctx.nodes
        rows = ctx.session.rows
        grad3 = per_example(grad.flatten(2).transpose(1, 2), rows)
        if bias_node is not None:
            ctx.session.dense(bias_node, grad3.sum(1))
        if weight_node is not None:
            right = kept if ctx.projected else per_example(patches(kept, weight.shape[2:], ctx.spec), rows)
            ctx.session.sink.pair(weight_node.root, grad3, right)
        grad_x = None
        if ctx.needs_input_grad[2]:
            grad_x = torch.ops.aten.convolution_backward(
                grad, grad.new_empty(ctx.x_shape), weight, None, stride, padding, dilation, False, [0] * len(stride), 1,
                [True, False, False],
            )[0].to(ctx.dtype)  # fmt: skip
        return None, None, grad_x, None, None, None, None, None


class UserTap(torch.autograd.Function):
    """A user's operation: input gradients by torch, the parameters' per-example gradients by the function that was registered."""

    @staticmethod
    def forward(ctx: Any, anchor, session: Session, func, per_example_grad, nodes: list[Node | None], kwargs: dict, *args):
        ctx.session, ctx.func, ctx.rule, ctx.nodes, ctx.kwargs = session, func, per_example_grad, nodes, kwargs
        session.announce(*nodes)
        ctx.args = [None if isinstance(a, Tensor) else a for a in args]
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in args))
        return func(*args, **kwargs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        args = [other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.args)]
        for position, node in enumerate(ctx.nodes):
            if node is not None:
                ctx.session.dense(node, ctx.rule(grad, position, args, ctx.kwargs))
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[6:]) if need]
        grads: list[Tensor | None] = [None] * len(args)
        if wanted:
            with torch.enable_grad():
                fresh = [a.detach().requires_grad_(i in wanted) if isinstance(a, Tensor) else a for i, a in enumerate(args)]
                found = torch.autograd.grad(ctx.func(*fresh, **ctx.kwargs), [fresh[i] for i in wanted], grad)
            for i, g in zip(wanted, found):
                grads[i] = g
        return None, None, None, None, None, None, *grads
