"""The fast rules: operations whose per-example gradient is a pair of factors or a cheap sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grape_ray.engines.capture.capture_pass import Session
from grape_ray.engines.capture.dispatch import fast_rule, general, own, shared
from grape_ray.engines.capture.taps import ConvTap, EmbeddingTap, MatrixTap, NormTap
from grape_ray.engines.capture.tracked import Node, Tracked, tracked_in
from grape_ray.errors import UnsupportedLayer


def _bind(args: tuple, kwargs: dict, names: str, **defaults: Any) -> list[Any]:
    """The arguments by name, in order."""
    listed = names.split()
    given = dict(zip(listed, args)) | kwargs
    return [given.get(n, defaults.get(n)) for n in listed]


def _node(value: Any) -> Node | None:
    return value.node if isinstance(value, Tracked) else None


def _plain(value: Any) -> Any:
    return value.node.value if isinstance(value, Tracked) else value


def _matrix(
    session: Session, name: str, x: Tensor, weight: Any, bias: Any, by_rows: bool
) -> Tensor:
    nodes = _node(weight), _node(bias)
    tap = session.tap(nodes, name, x.shape[:-1])
    return MatrixTap.apply(
        session.anchor, session, tap, x, _plain(weight), _plain(bias), nodes, by_rows
    )


def _learned_elsewhere(*values: Any) -> bool:
    """Whether a weight that is not tracked has a gradient of its own, such as one that the batch
    itself computes.
    """
    return any(
        isinstance(v, Tensor) and not isinstance(v, Tracked) and v.requires_grad for v in values
    )


@fast_rule("linear")
def linear(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    x, weight, bias = _bind(args, kwargs, "input weight bias")
    if isinstance(x, Tracked) or weight.ndim != 2 or not session.depends(name, args, kwargs):
        return general(session, func, name, args, kwargs)
    if _learned_elsewhere(weight, bias):
        if isinstance(weight, Tracked):
            return _matrix(session, name, x, weight, None, by_rows=True) + bias
        return func(x, weight) + bias
    return _matrix(session, name, x, weight, bias, by_rows=True)


@fast_rule("matmul", "mm", "rmatmul")
def matmul(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    x, weight = _bind(args, kwargs, "input other")
    if name == "rmatmul":
        x, weight = weight, x
    if (
        isinstance(x, Tracked)
        or weight.ndim != 2
        or x.ndim < 2
        or not session.depends(name, args, kwargs)
    ):
        return general(session, torch.matmul, "matmul", (x, weight), {})
    return _matrix(session, name, x, weight, None, by_rows=False)


@fast_rule("addmm")
def addmm(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """bias + x W, as GPT-2's Conv1D writes it."""
    bias, x, weight, beta, alpha = _bind(
        args, kwargs, "input mat1 mat2 beta alpha", beta=1, alpha=1
    )
    fits = (
        isinstance(bias, Tensor)
        and bias.ndim == 1
        and beta == 1
        and alpha == 1
        and not _learned_elsewhere(weight, bias)
    )
    if isinstance(x, Tracked) or not fits or not session.depends(name, args, kwargs):
        return general(session, func, name, args, kwargs)
    return _matrix(session, name, x, weight, bias, by_rows=False)


@fast_rule("embedding")
def embedding(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    ids, table, padding_idx, max_norm, _, by_freq, _ = _bind(
        args, kwargs, "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse"
    )  # fmt: skip
    if max_norm is not None or by_freq:
        raise UnsupportedLayer(
            f"embedding {table.node.label}",
            "max_norm or by_freq",
            "neither (they mix examples)",
            "unset them",
        )
    if padding_idx is not None:
        padding_idx %= table.shape[0]
    if not isinstance(table, Tracked) or not session.depends(name, args, kwargs):
        out = shared(session, func, name, args, kwargs)
        if isinstance(table, Tracked) and not isinstance(ids, Tracked):
            out.node.lookup = table.node, ids, padding_idx
        return out
    return _look_up(session, name, ids, table.node, padding_idx)


def _look_up(
    session: Session, name: str, ids: Tensor, node: Node, padding_idx: int | None
) -> Tensor:
    return EmbeddingTap.apply(
        session.anchor,
        session,
        session.tap([node], name, ids.shape),
        ids,
        node.value,
        node,
        padding_idx,
    )


@fast_rule("getitem")
def getitem(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """weight[ids], an embedding without the module."""
    table, ids = args
    looks_up = (
        isinstance(ids, Tensor)
        and not isinstance(ids, Tracked)
        and ids.dtype in (torch.int64, torch.int32)
    )
    if (
        isinstance(table, Tracked)
        and table.ndim == 2
        and looks_up
        and ids.ndim
        and session.depends(name, args, kwargs)
    ):
        return _look_up(session, name, ids % table.node.graph.shape[0], table.node, None)
    out = general(session, func, name, args, kwargs)
    if looks_up and isinstance(table, Tracked) and table.ndim == 2 and isinstance(out, Tracked):
        out.node.lookup = table.node, ids % table.node.graph.shape[0], None
    return out


@fast_rule("layer_norm")
def layer_norm(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    x, shape, weight, bias, eps, _ = _bind(
        args, kwargs, "input normalized_shape weight bias eps cudnn_enable", eps=1e-5
    )
    if (
        isinstance(x, Tracked)
        or _learned_elsewhere(weight, bias)
        or not session.depends(name, args, kwargs)
    ):
        return general(session, func, name, args, kwargs)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()
    nodes, shape = (_node(weight), _node(bias)), tuple(shape)
    tap = session.tap(nodes, name, x.shape[: x.ndim - len(shape)])
    y = NormTap.apply(
        session.anchor, session, tap, x, shape, _plain(weight), _plain(bias), nodes, eps
    )
    return y.to(dtype) if dtype == x.dtype else y


def _per_channel(session: Session, y: Tensor, weight: Any, bias: Any) -> Tensor:
    """y * weight + bias with one of each a channel (dimension 1), through the broadcasting
    rules.
    """
    shape = (1, -1, *[1] * (y.ndim - 2))
    if weight is not None:
        y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


@fast_rule("group_norm")
def group_norm(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    x, groups, weight, bias, eps = _bind(args, kwargs, "input num_groups weight bias eps", eps=1e-5)
    if not session.depends(name, args, kwargs):
        return shared(session, func, name, args, kwargs)
    return _per_channel(session, F.group_norm(x, groups, None, None, eps), weight, bias)


@fast_rule("batch_norm")
def batch_norm(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    x, mean, var, weight, bias, training, _, eps = _bind(
        args, kwargs, "input running_mean running_var weight bias training momentum eps",
        training=False, eps=1e-5
    )  # fmt: skip
    if training:
        label = ", ".join(t.node.label for t in tracked_in(args, kwargs))
        raise UnsupportedLayer(
            f"batch normalisation {label} in training mode",
            None,
            "no mixing of examples",
            "use GroupNorm or call .eval() on the layer",
        )
    if not session.depends(name, args, kwargs):
        return shared(session, func, name, args, kwargs)
    return _per_channel(
        session, F.batch_norm(x, mean, var, None, None, False, 0.0, eps), weight, bias
    )


@fast_rule("rms_norm")
def rms_norm(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    x, shape, weight, eps = _bind(args, kwargs, "input normalized_shape weight eps")
    if isinstance(x, Tracked) or not session.depends(name, args, kwargs):
        return general(session, func, name, args, kwargs)
    return F.rms_norm(x, shape, None, eps) * weight


@fast_rule("conv1d", "conv2d", "conv3d")
def convolution(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    x, weight, bias, stride, padding, dilation, groups = _bind(
        args, kwargs, "input weight bias stride padding dilation groups", stride=1, padding=0,
        dilation=1, groups=1
    )  # fmt: skip
    dims = weight.ndim - 2
    node = _node(weight)
    plain = (
        node is None or (node.root is not None and not node.transposed)
    ) and not _learned_elsewhere(weight, bias)
    fits = (
        plain and not isinstance(padding, str) and groups == 1 and dims <= 2 and x.ndim == dims + 2
    )
    if isinstance(x, Tracked) or not fits or not session.depends(name, args, kwargs):
        return general(session, func, name, args, kwargs)
    spec = tuple([v] * dims if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    nodes = node, _node(bias)
    tap = session.tap(nodes, name, x.shape[:1])
    return ConvTap.apply(session.anchor, session, tap, x, _plain(weight), _plain(bias), nodes, spec)


@fast_rule("scaled_dot_product_attention")
def attention(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """Attention with a learned bias (T5's relative positions) as its mask."""
    query, mask = args[0], kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    args, kwargs = (
        args[:3],
        {**dict(zip(("attn_mask", "dropout_p", "is_causal", "scale"), args[3:])), **kwargs},
    )
    if len(tracked_in(args, kwargs)) != 1 or not isinstance(mask, Tracked):
        return general(session, func, name, args, kwargs)
    if not session.depends(name, args, kwargs):
        return shared(session, func, name, args, kwargs)
    shape = (*query.shape[:-1], args[1].shape[-2])
    return func(*args, **(kwargs | {"attn_mask": own(session, mask, shape)}))


@fast_rule("einsum")
def einsum(session: Session, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """A product with one parameter, each of whose indices is either summed or new: a matrix product
    over any leading dimensions.
    """
    equation, operands = (
        args[0],
        (args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]),
    )
    weights = [o for o in operands if isinstance(o, Tracked)]
    parts = equation.replace(" ", "").split("->") if isinstance(equation, str) else []
    if (
        len(operands) != 2
        or len(weights) != 1
        or len(parts) != 2
        or "." in equation
        or not session.depends(name, args, kwargs)
    ):
        return general(session, func, name, args, kwargs)
    number = 0 if operands[0] is weights[0] else 1
    terms, out = parts[0].split(","), parts[1]
    of_weight, of_x = terms[number], terms[1 - number]
    summed = [i for i in of_weight if i in of_x and i not in out]
    new = [i for i in of_weight if i not in of_x and i in out]
    lead = [i for i in of_x if i not in of_weight and i in out]
    each_once = all(len(set(t)) == len(t) for t in (*terms, out))
    if (
        not summed
        or not each_once
        or len(summed) + len(new) != len(of_weight)
        or len(summed) + len(lead) != len(of_x)
    ):
        return general(session, func, name, args, kwargs)
    x, weight = operands[1 - number], weights[0]
    sizes = dict(zip(of_weight, weight.shape)) | dict(zip(of_x, x.shape))
    x = x.permute([of_x.index(i) for i in (*lead, *summed)]).flatten(len(lead))
    weight = weight.permute([of_weight.index(i) for i in (*summed, *new)]).reshape(x.shape[-1], -1)
    y = (x @ weight).unflatten(-1, [sizes[i] for i in new] or [1])
    y = y if new else y.squeeze(-1)
    return y.permute([[*lead, *new].index(i) for i in out])
