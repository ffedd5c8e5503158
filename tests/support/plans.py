"""Plans of runs from flat keywords, as `grape_ray.train` takes them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from grape_ray.config.schema import Config
from grape_ray.training.plan import Plan
from grape_ray.training.planning import plan_run
from grape_ray.training.request import Payment, Places, Shared


def planned(config: Config, **options: Any) -> Plan:
    """`plan_run`, with the fields of its Places, Payment and Shared as options of their own."""
    parts = {
        name: kind(**{f.name: options.pop(f.name) for f in fields(kind) if f.name in options})
        for name, kind in (("places", Places), ("payment", Payment), ("shared", Shared))
    }
    return plan_run(config, **parts, **options)
