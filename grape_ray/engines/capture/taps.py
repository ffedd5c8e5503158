"""Autograd functions that return the input's gradient and hand (activation, output gradient) to the
sink: no dense weight gradient.

Shapes: B examples, T positions, I in, O out. Each tap takes the session's anchor first, so that
backward reaches it even where no input needs a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grape_ray.engines.algebra.factor_pairs import Index
from grape_ray.engines.capture.capture_pass import Session, Tap
from grape_ray.engines.capture.tracked import Node

HALF = (torch.float16, torch.bfloat16)


def _cast(*tensors: Tensor | None) -> list[Any]:
    """The tensors as autocast would pass them to a matrix product."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


class ExpandTap(torch.autograd.Function):
    """A shared value expanded to a shape, its gradient taken apart by example before it is
    summed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        session: Session,
        tap: Tap,
        node: Node,
        shape: tuple[int, ...],
        lead: tuple[int, ...],
    ) -> Tensor:
        ctx.session, ctx.tap, ctx.node, ctx.lead = session, tap, node, lead
        return node.value.expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        rest = [d for d in range(grad.ndim) if d not in ctx.lead]
        grad = grad.permute(*ctx.lead, *rest)
        if ctx.session.arriving(ctx.tap, grad):
            own = ctx.session.summed(ctx.tap, grad)
            ctx.session.dense(ctx.node, own.reshape(ctx.session.rows, *ctx.node.graph.shape))
        return None, None, None, None, None, None


class InsideTap(torch.autograd.Function):
    """A shared value whose own rows belong to examples: each example's gradient is what arrives in
    its rows.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, session: Session, tap: Tap, node: Node) -> Tensor:
        ctx.session, ctx.tap, ctx.node = session, tap, node
        return node.value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        session, layout = ctx.session, ctx.tap.layout
        if session.arriving(ctx.tap, grad):
            owner = layout.owners(tuple(grad.shape), session.rows).to(grad.device)
            mine = owner == torch.arange(session.rows, device=grad.device).unsqueeze(1)
            sizes = [1] * grad.ndim
            if layout.only is None:
                sizes[layout.axis] = -1
            session.dense(ctx.node, grad * mine.view(session.rows, *sizes))
        return None, None, None, None


def expanded(session: Session, node: Node, shape: tuple[int, ...]) -> Tensor:
    """The value of a node expanded to `shape`, as a plain tensor with a gradient of its own for
    each example.
    """
    lead = new_dims(node, shape)
    tap = session.tap([node], "expand", [shape[d] for d in lead])
    return ExpandTap.apply(session.anchor, session, tap, node, shape, lead)


def new_dims(node: Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions of `shape` along which a value is repeated."""
    extra = len(shape) - node.graph.ndim
    have = (1,) * extra + tuple(node.graph.shape)
    return tuple(
        d
        for d, (want, size) in enumerate(zip(shape, have))
        if size == 1 and (want != 1 or d < extra)
    )


def inside(session: Session, node: Node) -> Tensor:
    """The value of a node as it is, as a plain tensor whose rows are those of examples."""
    if node.lookup is not None:
        table, ids, padding_idx = node.lookup
        tap = session.tap([table], "embedding", ids.shape)
        return EmbeddingTap.apply(
            session.anchor, session, tap, ids, table.value, table, padding_idx
        )
    tap = session.tap([node], "inside", node.graph.shape)
    return InsideTap.apply(session.anchor, session, tap, node)


class MatrixTap(torch.autograd.Function):
    """x W^T + b (`by_rows`, as nn.Linear) or x W + b; x is (*lead, I), of which the sink decides
    what is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor,
        session: Session,
        tap: Tap,
        x,
        weight,
        bias,
        nodes: tuple[Node | None, Node | None],
        by_rows: bool,
    ):
        dtype = x.dtype
        x, weight, bias = _cast(x, weight, bias)
        ctx.session, ctx.tap, ctx.nodes, ctx.by_rows, ctx.dtype = (
            session,
            tap,
            nodes,
            by_rows,
            dtype,
        )
        session.half |= x.dtype in HALF
        weight_node, kept = nodes[0], None
        if weight_node is not None:
            # the parameter's axis on which x lies
            ctx.axis = int(by_rows != weight_node.transposed)
            kept = _keep(session, weight_node.root, ctx.axis, x) if weight_node.root else x
        ctx.save_for_backward(kept, weight)
        out = F.linear(x, weight if by_rows else weight.T, bias)
        # torch lets nobody write into a view that a Function returns
        return out.clone() if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        kept, weight = ctx.saved_tensors
        session, tap = ctx.session, ctx.tap
        if session.arriving(tap, grad):
            _hand_over(
                ctx,
                session.by_example(tap, grad),
                None if kept is None else session.by_example(tap, kept),
            )
        grad_x = (
            (grad @ (weight if ctx.by_rows else weight.T)).to(ctx.dtype)
            if ctx.needs_input_grad[3]
            else None
        )
        return None, None, None, grad_x, None, None, None, None


def _keep(session: Session, name: str, axis: int, x: Tensor) -> Tensor:
    """What forward keeps of a factor, never in the lower precision of an autocast around the
    engine.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return session.sink.keep(name, axis, x)
    with torch.autocast(x.device.type, enabled=False):
        return session.sink.keep(name, axis, x)


def _hand_over(ctx: Any, grad: Tensor, kept: Tensor | None) -> None:
    """Tells the sink of one use of a weight and its bias; grad (B,T,O), kept (B,T,I) or projected
    (B,T,R).
    """
    sink, (weight_node, bias_node) = ctx.session.sink, ctx.nodes
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
    """Rows of a table by integer ids of shape (*lead,); rows at `padding_idx` get no gradient, as
    in torch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor,
        session: Session,
        tap: Tap,
        ids,
        weight,
        node: Node,
        padding_idx: int | None,
    ):
        ctx.session, ctx.tap, ctx.node, ctx.padding_idx = session, tap, node, padding_idx
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        session, node, table = ctx.session, ctx.node, ctx.node.graph
        if session.arriving(ctx.tap, grad):
            ids2, grad3 = session.by_example(ctx.tap, ids), session.by_example(ctx.tap, grad)
            if ctx.padding_idx is not None:
                grad3 = grad3.masked_fill(
                    (ids2 == ctx.padding_idx % table.shape[0]).unsqueeze(-1), 0
                )
            index = Index(ids2 % table.shape[0], table.shape[0])
            if node.root and not node.transposed:
                session.sink.pair(node.root, index, grad3)
            else:
                session.dense(node, index.outer(grad3))
        return None, None, None, None, None, None, None


class NormTap(torch.autograd.Function):
    """Layer normalisation over the last dimensions, with per-example gradients of scale and
    shift.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor,
        session: Session,
        tap: Tap,
        x,
        shape,
        weight,
        bias,
        nodes: tuple[Node | None, Node | None],
        eps: float,
    ):
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.session, ctx.tap, ctx.nodes, ctx.shape = session, tap, nodes, shape
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        x, mean, rstd, weight, bias = ctx.saved_tensors
        session, (weight_node, bias_node) = ctx.session, ctx.nodes
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
        )[0]  # fmt: skip
        if session.arriving(ctx.tap, grad):
            if weight_node is not None:
                session.dense(
                    weight_node, session.summed(ctx.tap, x.sub(mean).mul_(rstd).mul_(grad))
                )
            if bias_node is not None:
                session.dense(bias_node, session.summed(ctx.tap, grad))
        return None, None, None, grad_x, None, None, None, None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, spec: tuple) -> Tensor:
    stride, padding, dilation = spec
    return torch.convolution(
        x, weight, bias, stride, padding, dilation, False, [0] * len(stride), 1
    )


class ConvTap(torch.autograd.Function):
    """A convolution (groups=1), seen as a matrix (O, C * kernel) over patches; the sink decides
    what is kept of the input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor,
        session: Session,
        tap: Tap,
        x,
        weight,
        bias,
        nodes: tuple[Node | None, Node | None],
        spec: tuple,
    ):
        dtype = x.dtype
        x, weight, bias = _cast(x, weight, bias)
        ctx.session, ctx.tap, ctx.nodes, ctx.spec, ctx.dtype = session, tap, nodes, spec, dtype
        session.half |= x.dtype in HALF
        weight_node = nodes[0]
        ctx.projected, kept = False, None
        if weight_node is not None and session.sink.compresses(weight_node.root, 1):
            # projecting patches is a convolution with the projection's columns as filters
            ctx.projected = True
            filters = session.sink.matrix(weight_node.root, x).T.reshape(-1, *weight.shape[1:])
            with torch.autocast(x.device.type, enabled=False):
                kept = _convolve(x, filters, None, spec)
        elif weight_node is not None:
            kept = x
        ctx.x_shape = x.shape
        ctx.save_for_backward(kept, weight)
        return _convolve(x, weight, bias, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        from grape_ray.engines.algebra.patches import patches

        kept, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.spec
        session, (weight_node, bias_node) = ctx.session, ctx.nodes
        if session.arriving(ctx.tap, grad):
            grad3 = _tokens(session, ctx.tap, grad.flatten(2).transpose(1, 2))
            if bias_node is not None:
                session.dense(bias_node, grad3.sum(1))
            if weight_node is not None:
                positions = (
                    kept.flatten(2).transpose(1, 2)
                    if ctx.projected
                    else patches(kept, weight.shape[2:], ctx.spec)
                )
                session.sink.pair(weight_node.root, grad3, _tokens(session, ctx.tap, positions))
        grad_x = None
        if ctx.needs_input_grad[3]:
            grad_x = torch.ops.aten.convolution_backward(
                grad, grad.new_empty(ctx.x_shape), weight, None, stride, padding, dilation, False,
                [0] * len(stride), 1, [True, False, False],
            )[0].to(ctx.dtype)  # fmt: skip
        return None, None, None, grad_x, None, None, None, None, None


def _tokens(session: Session, tap: Tap, images: Tensor) -> Tensor:
    """(N, positions, D) -> (B, T, D): the positions of all images of an example."""
    return session.by_example(tap, images).flatten(1, 2)


class UserTap(torch.autograd.Function):
    """A user's operation: input gradients by torch, the parameters' per-example gradients by the
    function that was registered.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor,
        session: Session,
        tap: Tap,
        func,
        per_example_grad,
        nodes: list[Node | None],
        kwargs: dict,
        *args,
    ):
        ctx.session, ctx.tap, ctx.func, ctx.rule, ctx.nodes, ctx.kwargs = (
            session,
            tap,
            func,
            per_example_grad,
            nodes,
            kwargs,
        )
        ctx.args = [None if isinstance(a, Tensor) else a for a in args]
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in args))
        return func(*args, **kwargs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        args = [
            other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.args)
        ]
        found = {
            position: ctx.rule(grad, position, args, ctx.kwargs)
            for position, node in enumerate(ctx.nodes)
            if node is not None
        }
        if ctx.session.arriving(ctx.tap, torch.cat([g.flatten(1) for g in found.values()], 1)):
            for position, grads in found.items():
                ctx.session.dense(ctx.nodes[position], grads)
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[7:]) if need]
        grads: list[Tensor | None] = [None] * len(args)
        if wanted:
            with torch.enable_grad():
                fresh = [
                    a.detach().requires_grad_(i in wanted) if isinstance(a, Tensor) else a
                    for i, a in enumerate(args)
                ]
                found = torch.autograd.grad(
                    ctx.func(*fresh, **ctx.kwargs), [fresh[i] for i in wanted], grad
                )
            for i, g in zip(wanted, found):
                grads[i] = g
        return None, None, None, None, None, None, None, *grads
