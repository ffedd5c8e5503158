"""Differentially private training on Ray that costs less than non-private training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grape_ray.config.schema import Config, Method, Performance, Privacy
    from grape_ray.engines import make_engine, register_rule
    from grape_ray.optim import make_optimizer
    from grape_ray.privacy.noise import NoiseStream, privatize

__all__ = [
    "Config",
    "Method",
    "NoiseStream",
    "Performance",
    "Privacy",
    "make_engine",
    "make_optimizer",
    "privatize",
    "register_rule",
]

_HOMES = {
    "Config": "config.schema", "Method": "config.schema", "Performance": "config.schema",
    "Privacy": "config.schema", "NoiseStream": "privacy.noise", "make_engine": "engines",
    "make_optimizer": "optim", "privatize": "privacy.noise", "register_rule": "engines",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names are loaded on first use, so that the command line starts without torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"grape_ray.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'grape_ray' has no attribute {name!r}")
