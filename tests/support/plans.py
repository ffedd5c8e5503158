"""Plans of runs from flat keywords, as `grape_ray.train` takes them, and attempts to repeat."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from grape_ray.config.schema import Config
from grape_ray.distributed.comms import Comms
from grape_ray.ledger.interface import LedgerClient
from grape_ray.training.attempt import Attempt, begin_attempt
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


def same_streams(plan: Plan, comms: Comms, ledger: LedgerClient | None = None) -> Attempt:
    """A real attempt with the streams of another, the same each time: what only a test may do."""
    number = begin_attempt(plan, comms, ledger).number
    return Attempt(number, b"s" * 32, b"d" * 32, b"n" * 32, b"p" * 32)
