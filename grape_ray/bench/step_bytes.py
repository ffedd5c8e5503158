"""Which bytes a step holds: saved for backward, kept by the method, the sum, the optimizer's state.
Kinds overlap where memory is shared.

They are counted as distinct storages, without the model's own, and do not add up to the peak: not
all are held at once, and temporaries are in none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from grape_ray.bench.candidates import PrivateStep, Step
from grape_ray.engines.algebra.factor_pairs import Index
from grape_ray.engines.collector import Collector
from grape_ray.privacy.types import ClippedSum


def measure_holdings(step: Step) -> dict[str, int]:
    """Bytes by kind during one step; it takes one step."""
    held: Any = step
    own = {_place(p) for p in held.model.parameters()} | {_place(b) for b in held.model.buffers()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    found: dict[str, int] = {}
    if isinstance(step, PrivateStep):
        _watch(step, own, found)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    result = {
        "saved for backward": sum(n for place, n in saved.items() if place not in own),
        **found,
    }
    if hasattr(held, "optimizer"):
        state = (
            held.optimizer._state if isinstance(step, PrivateStep) else dict(held.optimizer.state)
        )
        result["optimizer state"] = _bytes(state, own)
    return result


def _watch(step: PrivateStep, own: set[int], found: dict[str, int]) -> None:
    """Notes what the sink keeps when the norms are asked for, and the size of the sum."""
    engine: Any = step.engine
    make_collector, clipped_sum = engine._make_collector, engine.clipped_sum

    def make(examples: int, step: int) -> Collector:
        collector = make_collector(examples, step)
        norms = collector.squared_norms

        def squared_norms() -> dict[str, Tensor]:
            kept = [value for name, value in vars(collector).items() if name != "params"]
            found["kept for norms and sum"] = max(
                found.get("kept for norms and sum", 0), _bytes(kept, own)
            )
            return norms()

        collector.squared_norms = squared_norms
        return collector

    def summed(*args: object, **kwargs: object) -> ClippedSum:
        out = clipped_sum(*args, **kwargs)
        found["clipped sum"] = _bytes(dict(out.tensors), own)
        return out

    engine._make_collector, engine.clipped_sum = make, summed


def _place(tensor: Tensor) -> int:
    """The storage's identity."""
    return tensor.untyped_storage()._cdata


def _leaves(values: object) -> Iterable[Tensor]:
    """All tensors of nested containers."""
    for leaf in tree_flatten(values)[0]:
        if isinstance(leaf, Index):
            yield leaf.ids
        elif isinstance(leaf, Tensor):
            yield leaf


def _bytes(values: object, own: set[int]) -> int:
    """Bytes of distinct storages, without the model's own."""
    return sum(
        {
            _place(t): t.untyped_storage().nbytes() for t in _leaves(values) if _place(t) not in own
        }.values()
    )
