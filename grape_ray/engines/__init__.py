"""Engines: one per way of having clipped sums, chosen by name from the table in
`grape_ray.config.methods`.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from grape_ray.config.methods import METHODS
from grape_ray.config.schema import Method, Privacy
from grape_ray.engines.directions import Directions
from grape_ray.engines.engine import Engine
from grape_ray.engines.norm_routes import check_patterns
from grape_ray.engines.rules.table import register_rule
from grape_ray.engines.subspace import Gaussian, Subspace, plan_projections

__all__ = ["Engine", "from_config", "make_engine", "register_rule"]


def make_engine(
    model: nn.Module,
    method: str = "grape",
    clip_norm: float = 1.0,
    *,
    clipping: str = "flat",
    key: bytes = b"",
    **options: Any,
) -> Engine:
    """An engine for a model, without Ray and without a config file.

    Args:
        model: any nn.Module whose trainable parameters have requires_grad=True.
        method: a row of `grape_ray.config.methods.METHODS`. clip_norm: bound on each example's
            contribution, L2.
        clipping: `flat`, `automatic` or `per_layer`. key: public key of the projections, any bytes.
        options: fields of `grape_ray.config.schema.Method` (rank, side, refresh, scale, dense,
            project_min_numel, ...), or `probes` and `shared_probes` of
            `grape_ray.config.schema.Privacy`.

    Returns:
        An Engine; `engine.clipped_sum(per_example_loss, batch)` is its one verb.

    Raises:
        ConfigError: an unknown name, a value out of range, or a rank not below a layer's compressed
            side.
        UnsupportedLayer: a layer that mixes examples.
    """
    own = {k: options.pop(k) for k in ("probes", "shared_probes") if k in options}
    return from_config(
        model,
        Privacy(clip_norm=clip_norm, clipping=clipping, **own),
        Method(name=method, **options),
        key,
    )


def from_config(model: nn.Module, privacy: Privacy, method: Method, key: bytes) -> Engine:
    """The engine that a run's config names."""
    info = METHODS[method.name]
    names = [name for name, _ in model.named_parameters()]
    check_patterns("method.dense", method.dense, names)
    check_patterns("method.rates", [pattern for pattern, _ in method.rate_multiples], names)
    check_patterns(
        "method.routes",
        [route.rpartition(":")[0] for route in method.routes if ":" in route[1:]],
        names,
    )
    subspace = Subspace()
    if info.subspace == "gaussian":
        plan = plan_projections(
            model, method.rank, method.side, method.dense, method.project_min_numel
        )
        subspace = Gaussian(plan, key, method.refresh_steps, method.scale)
    elif info.subspace == "directions":
        subspace = Directions(method.directions, key, method.refresh_steps)
    module, name = info.engine.split(":")
    engine: type[Engine] = getattr(importlib.import_module(f"grape_ray.engines.{module}"), name)
    return engine.from_config(model, privacy, method, subspace)
