"""The definition that engines are held against: each example's gradient by ordinary autograd, the
averages of units, and clip factors, written as plainly as possible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grape_ray.engines import Engine
from grape_ray.engines.capture.batches import Batch, mapped
from grape_ray.engines.capture.random_state import random_states, set_states
from grape_ray.engines.directions import SLOPES
from grape_ray.engines.dp_zero import DpZero
from grape_ray.engines.engine import PerExampleLoss
from grape_ray.engines.subspace import Subspace


def gradients_of_rows(
    engine: Engine, loss: PerExampleLoss, batch: Batch, rows: int
) -> list[dict[str, Tensor]]:
    """The definition, by ordinary autograd: each example's gradient in float64, projected; of one
    pass, so that masks are the same. Of method `dp_zero`: each example's slopes.
    """
    if isinstance(engine, DpZero):
        return _slopes_of_rows(engine, loss, batch)
    names, params = list(engine.params), list(engine.params.values())
    values = loss(engine.model, mapped(batch))
    found = []
    for index in range(rows):
        grads: Sequence[Tensor | None] = [None] * len(params)
        if values.requires_grad:
            grads = torch.autograd.grad(values[index], params, allow_unused=True, retain_graph=True)
        found.append(
            {
                n: _projected(engine.subspace, n, torch.zeros_like(p) if g is None else g).double()
                for n, p, g in zip(names, params, grads)
            }
        )
    return found


@torch.no_grad()
def _slopes_of_rows(engine: DpZero, loss: PerExampleLoss, batch: Batch) -> list[dict[str, Tensor]]:
    """Differences of losses over distances, as the losses are with weights that were moved; the
    weights are as they were when it returns.

    They are moved with the engine's own roundings: a slope near zero is all rounding of losses, and
    clipped it would count in full with either sign.
    """
    space, params = engine.subspace, engine.params
    kept = {name: param.clone() for name, param in params.items()}
    states = random_states(next(iter(params.values())).device)

    def losses() -> Tensor:
        set_states(states)
        return loss(engine.model, mapped(batch)).double()

    slopes = []
    try:
        for number in range(space.count):
            for name, param in params.items():
                step = engine.smoothing * space.direction(name, number, 0, param)
                param.copy_(kept[name] + step)
            ahead = losses()
            for name, param in params.items():
                param.copy_(2 * kept[name] - param)
            slopes.append((ahead - losses()) / (2 * engine.smoothing) / math.sqrt(space.count))
    finally:
        for name, param in params.items():
            param.copy_(kept[name])
    return [{SLOPES: example} for example in torch.stack(slopes, 1)]


def averaged(references: Sequence[Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    """The gradients of units, where the first two rows are one unit's."""
    first, second, *rest = references
    return [{name: (grad + second[name]) / 2 for name, grad in first.items()}, *rest]


def clip_factors(grads: Mapping[str, Tensor], engine: Engine) -> dict[str, float]:
    """The clip factor of each tensor of one example by the definitions in `privacy.clipping`,
    written once more without its bounds on rounding, so that an error there shows here.
    """
    if not engine.private:
        return dict.fromkeys(grads, 1.0)
    squares = {name: float(g.square().sum()) for name, g in grads.items()}
    norm = math.sqrt(sum(squares.values()))
    if engine.clipping == "automatic":
        return dict.fromkeys(grads, engine.clip_norm / (norm + 0.01))
    if engine.clipping == "flat":
        return dict.fromkeys(grads, min(1.0, engine.clip_norm / norm) if norm else 1.0)
    bound = engine.clip_norm / math.sqrt(len(grads))
    return {name: min(1.0, bound / math.sqrt(s)) if s else 1.0 for name, s in squares.items()}


def _projected(subspace: Subspace, name: str, grad: Tensor) -> Tensor:
    """One gradient in coordinates: (rank, I) of O x I where the outputs are compressed, (O, rank)
    where the inputs are; as it is where the weight is trained in full.
    """
    plan = subspace.plan.get(name)
    if plan is None:
        return grad
    flat = grad.reshape(plan.rows, -1)
    matrix = subspace.matrix(name, 0, grad).to(flat.dtype)
    return matrix.T @ flat if plan.axis == 0 else flat @ matrix
