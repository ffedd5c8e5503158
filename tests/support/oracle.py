"""The reference: one ordinary backward pass an example, then the definition of clipping, written as
plainly as possible.
"""

from __future__ import annotations

import copy
import math

import torch

from grape_ray.engines.dp_zero import DpZero


def one_of(batch, index, rows):
    """Example `index` alone."""
    return {
        k: (
            v[index : index + 1]
            if isinstance(v, torch.Tensor) and v.ndim and v.shape[0] == rows
            else v
        )
        for k, v in batch.items()
    }


def example_gradients(model, loss, batch, rows):
    """A dict of gradients an example, unused tensors as zeros."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    out = []
    for index in range(rows):
        value = loss(model, one_of(batch, index, rows)).sum()
        grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        out.append(
            {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), grads)}
        )
    return out


def projected(grads, subspace, period=0):
    """The gradients in the subspace's coordinates."""
    out = {}
    for name, grad in grads.items():
        plan = subspace.plan.get(name)
        if plan is None:
            out[name] = grad
            continue
        matrix, flat = subspace.matrix(name, period, grad), grad.reshape(plan.rows, -1)
        out[name] = matrix.T @ flat if plan.axis == 0 else flat @ matrix
    return out


def slopes(engine, loss, batch, rows, period=0):
    """Each example's slopes along the engine's directions, from copies of the model that were moved
    both ways, one example at a time.
    """
    space, step = engine.subspace, engine.smoothing

    def losses(number, distance):
        moved = copy.deepcopy(engine.model)
        with torch.no_grad():
            for name, param in moved.named_parameters():
                if param.requires_grad and param.numel():
                    param += distance * space.direction(name, number, period, param)
            return [float(loss(moved, one_of(batch, i, rows)).sum()) for i in range(rows)]

    ends = [(losses(k, step), losses(k, -step)) for k in range(space.count)]
    found = [
        [(ahead[i] - behind[i]) / (2 * step) / math.sqrt(space.count) for ahead, behind in ends]
        for i in range(rows)
    ]
    return [{"slopes": torch.tensor(mine, dtype=torch.float64)} for mine in found]


def coordinates(engine, loss, batch, rows, period=0):
    """Each example's gradient as the engine clips it."""
    if isinstance(engine, DpZero):
        return slopes(engine, loss, batch, rows, period)
    grads = example_gradients(engine.model, loss, batch, rows)
    return [projected(g, engine.subspace, period) for g in grads]


def norm_of(grads):
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))


def clipped(examples, clip_norm, clipping="flat"):
    """Sum of clipped gradients."""
    total = {name: torch.zeros_like(g) for name, g in examples[0].items()}
    for grads in examples:
        norm = norm_of(grads)
        for name, grad in grads.items():
            if clipping == "flat":
                factor = min(1.0, clip_norm / norm) if norm else 1.0
            elif clipping == "automatic":
                factor = clip_norm / (norm + 0.01)
            else:
                bound, own = clip_norm / math.sqrt(len(grads)), norm_of({name: grad})
                factor = min(1.0, bound / own) if own else 1.0
            total[name] += factor * grad
    return total


def expected(engine, loss, batch, rows, period=0):
    """What `engine.clipped_sum` must return."""
    examples = coordinates(engine, loss, batch, rows, period)
    return clipped(examples, engine.clip_norm, engine.clipping)


def averages(engine, loss, batch, groups):
    """The average gradient of each unit's rows, in coordinates; groups: (B,) the unit of a row."""
    rows = coordinates(engine, loss, batch, len(groups))
    found = []
    for unit in groups.unique():
        mine = [rows[row] for row in (groups == unit).nonzero()[:, 0]]
        found.append({name: torch.stack([g[name] for g in mine]).mean(0) for name in mine[0]})
    return found


def median_norm(model, loss, batch, rows):
    """A clip norm that clips about half of the examples."""
    norms = sorted(norm_of(g) for g in example_gradients(model, loss, batch, rows))
    return norms[(len(norms) - 1) // 2] * 1.001


def worst(got, want):
    """Largest difference, relative to the largest entry of the reference."""
    assert got.keys() == want.keys()
    scale = max(float(w.detach().abs().max()) for w in want.values()) or 1.0
    return max(float((got[n] - want[n]).detach().abs().max()) for n in want) / scale
