"""Differentially private training on Ray that costs less than non-private training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grape_ray.accounting import Mechanism
    from grape_ray.config.schema import Config, Method, Performance, Privacy
    from grape_ray.engines import make_engine, register_rule
    from grape_ray.ledger import Ledger, Study
    from grape_ray.optim import make_optimizer
    from grape_ray.privacy.noise import NoiseStream, privatize
    from grape_ray.ray_backend.fit import fit

__all__ = [
    "Config", "Ledger", "Mechanism", "Method", "NoiseStream", "Performance", "Privacy", "Study",
    "fit", "make_engine", "make_optimizer", "privatize", "register_rule",
]  # fmt: skip

_HOMES = {
    "config.schema": ("Config", "Method", "Performance", "Privacy"),
    "accounting": ("Mechanism",),
    "ledger": ("Ledger", "Study"),
    "privacy.noise": ("NoiseStream", "privatize"),
    "engines": ("make_engine", "register_rule"),
    "optim": ("make_optimizer",),
    "ray_backend.fit": ("fit",),
}


def __getattr__(name: str) -> object:
    """Public names are loaded on first use, so that the command line starts without torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"grape_ray.{home}"), name)
    raise AttributeError(f"module 'grape_ray' has no attribute {name!r}")
