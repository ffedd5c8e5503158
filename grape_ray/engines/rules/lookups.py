"""Look-ups of a table's rows by integer ids: `F.embedding`, and `weight[ids]` without a module."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from grape_ray.engines.algebra.factor_pairs import Index
from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.dispatch import general, shared
from grape_ray.engines.capture.rule import Rule, Saved, Settings
from grape_ray.engines.capture.tap_function import apply_rule
from grape_ray.engines.capture.torch_functions import Call, Result
from grape_ray.engines.capture.tracked import Node, Tracked
from grape_ray.engines.rules.arguments import bind
from grape_ray.errors import UnsupportedLayer


def _forward(args: tuple, settings: Settings) -> tuple[Tensor, Saved]:
    ids, table = args
    return F.embedding(ids, table), ()


def _factors(grad: Tensor, x: Tensor | None, settings: Settings) -> tuple[Tensor, Index]:
    """The ids as one-hot rows; the row at `padding_idx` gets no gradient, as in torch."""
    assert x is not None
    padding_idx, size = settings["padding_idx"], settings["size"]
    if padding_idx is not None:
        grad = grad.masked_fill((x == padding_idx).unsqueeze(-1), 0)
    return grad, Index(x % size, size)


# one-hot ids (*lead, I) times a table (I, O)
LOOK_UP = Rule(forward=_forward, factors=_factors, outputs_first=False)


def embedding(capture: CapturePass, call: Call) -> Result:
    """F.embedding."""
    ids, table, padding_idx, max_norm, _, by_freq, _ = bind(
        call, "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse"
    )
    if max_norm is not None or by_freq:
        raise UnsupportedLayer(
            f"embedding {table.node.label}",
            "max_norm or by_freq",
            "neither (they mix examples)",
            "unset them",
        )
    if padding_idx is not None:
        padding_idx %= table.shape[0]
    if isinstance(table, Tracked) and capture.depends(call):
        return _look_up(ids, table.node, padding_idx, call.name, capture)
    out = shared(capture, call)
    # positions are looked up at ids that all share; where they meet the batch, rows may be
    # examples' (`Node.look_up`)
    if isinstance(table, Tracked) and not isinstance(ids, Tracked):
        out.node.look_up = functools.partial(_look_up, ids, table.node, padding_idx, "embedding")
    return out


def plain_embedding(capture: CapturePass, call: Call) -> Result:
    """torch.embedding, whose table comes first and whose padding_idx of -1 is none."""
    table, ids, padding_idx, by_freq, sparse = bind(
        call, "weight indices padding_idx scale_grad_by_freq sparse", padding_idx=-1
    )
    padding_idx = padding_idx if padding_idx >= 0 else None
    args = (ids, table, padding_idx, None, 2.0, by_freq or False, sparse or False)
    return embedding(capture, Call(F.embedding, call.name, args, {}))


def getitem(capture: CapturePass, call: Call) -> Result:
    """weight[ids], an embedding without the module."""
    table, ids = call.args
    looks_up = (
        isinstance(table, Tracked)
        and table.ndim == 2
        and isinstance(ids, Tensor)
        and not isinstance(ids, Tracked)
        and ids.dtype in (torch.int64, torch.int32)
    )
    if not looks_up:
        return general(capture, call)
    rows = functools.partial(_look_up, ids % table.node.graph.shape[0], table.node, None)
    if ids.ndim and capture.depends(call):
        return rows(call.name, capture)
    out = general(capture, call)
    if isinstance(out, Tracked):
        out.node.look_up = functools.partial(rows, "embedding")
    return out


def _look_up(
    ids: Tensor, table: Node, padding_idx: int | None, name: str, capture: CapturePass
) -> Tensor:
    settings = {"padding_idx": padding_idx, "size": table.graph.shape[0]}
    return apply_rule(capture, LOOK_UP, name, (ids, table), ids.shape, settings)
