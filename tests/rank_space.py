"""A tune space of which no running trial can take up another value."""

from __future__ import annotations

from typing import Any

from ray import tune

from grape_ray.sweeps import SweepStudy
from tests import tiny_space


def space() -> dict[str, Any]:
    return {"method.rank": tune.choice([4, 8])}


def study() -> SweepStudy:
    return tiny_space.study()
