"""The one table of methods: a name, what it is made of, and where its engine lives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """One point in the space of methods.

    Attributes:
        engine: `module:Class` below `grape_ray.engines`. title: one line for tables.
        subspace: `identity`, `gaussian` (before the clip), `svd` (of the private gradient, after
            the noise) or `directions` (a few, of all weights together, before the clip).
        refresh: steps between new projections, unless a config says otherwise.
        optimizer: `adam` or `sgd`, unless a config says otherwise.
        private: whether it carries a guarantee.
        exact: whether the clip bounds every example's norm with certainty; otherwise the accountant
            covers the distribution of the estimate.
        shards: whether it trains a model whose weights are sharded over the workers
            (performance.sharded).
    """

    engine: str
    title: str
    subspace: str = "identity"
    refresh: int = 1
    optimizer: str = "adam"
    private: bool = True
    exact: bool = True
    shards: bool = False


METHODS: dict[str, MethodInfo] = {
    "grape": MethodInfo(
        engine="engine:Engine",
        title="DP-GRAPE: project, clip, noise",
        subspace="gaussian",
        shards=True,
    ),
    "dp_adam": MethodInfo(
        engine="engine:Engine", title="per-example gradients in full", shards=True
    ),
    "ghost": MethodInfo(engine="ghost:Ghost", title="ghost clipping: two backward passes"),
    "bookkeeping": MethodInfo(
        engine="bookkeeping:BookKeeping", title="Book-Keeping: one backward pass", shards=True
    ),
    "randomized": MethodInfo(engine="randomized:Randomized", title="DP-SGD-RC", exact=False),
    "dp_galore": MethodInfo(
        engine="bookkeeping:BookKeeping",
        title="DP-GaLore: SVD of the private gradient",
        subspace="svd",
        refresh=100,
    ),
    "dp_zero": MethodInfo(
        engine="dp_zero:DpZero",
        title="DPZero: differences of losses, no backward pass",
        subspace="directions",
        optimizer="sgd",
    ),
    "none": MethodInfo(
        engine="non_private:NonPrivate", title="non-private baseline", private=False
    ),
}
