"""The one table of methods: a name, what it is made of, and where its engine lives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodInfo:
    """One point in the space of methods (DESIGN.md, section 2).

    Attributes:
        engine: `module:Class` below `grape_ray.engines`.
        subspace: `identity`, `gaussian` (before the clip) or `svd` (of the private gradient, after
            the noise).
        norm: how an example's norm is had.
        private: whether it carries a guarantee.
        exact: whether the clip bounds every example's norm surely; otherwise the accountant covers
            the estimate's law.
        title: one line for tables.
        shards: whether it trains a model whose weights are spread over the workers
            (performance.sharded).
    """

    engine: str
    subspace: str
    norm: str
    private: bool
    exact: bool
    title: str
    shards: bool = False


METHODS: dict[str, MethodInfo] = {
    "grape": MethodInfo(
        "engine:Engine",
        "gaussian",
        "exact, of the projected gradient",
        True,
        True,
        "DP-GRAPE: project, clip, noise",
        True,
    ),
    "dp_adam": MethodInfo(
        "engine:Engine",
        "identity",
        "exact, materialised",
        True,
        True,
        "per-example gradients in full",
        True,
    ),
    "ghost": MethodInfo(
        "ghost:Ghost",
        "identity",
        "exact, Gram or transient",
        True,
        True,
        "ghost clipping: two backward passes",
    ),
    "bookkeeping": MethodInfo(
        "bookkeeping:BookKeeping",
        "identity",
        "exact, Gram or instantiated",
        True,
        True,
        "Book-Keeping: one backward pass",
        True,
    ),
    "randomized": MethodInfo(
        "randomized:Randomized",
        "identity",
        "Hutchinson or Hutch++ estimate",
        True,
        False,
        "DP-SGD-RC",
    ),
    "dp_galore": MethodInfo(
        "bookkeeping:BookKeeping",
        "svd",
        "exact, Gram or instantiated",
        True,
        True,
        "DP-GaLore: SVD of the private gradient",
    ),
    "none": MethodInfo(
        "non_private:NonPrivate", "identity", "-", False, True, "non-private yardstick"
    ),
}
