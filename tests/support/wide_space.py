"""A tune space of trials as different as one mechanism allows; no running trial can take up another
value of it.
"""

from __future__ import annotations

from typing import Any

from ray import tune

from grape_ray.tuning import SweepStudy
from tests.support.tiny import tiny


def space() -> dict[str, Any]:
    return {
        "privacy.steps": tune.choice([4, 8, 12]),
        "method.refresh": tune.choice([0, 3, 5]),
        "method.moments": tune.choice(["keep", "reset", "transfer"]),
        "method.name": tune.choice(["grape", "dp_adam", "ghost", "bookkeeping", "dp_galore"]),
    }


def study() -> SweepStudy:
    config = tiny().override(["performance.eval_every=4"])
    return SweepStudy(
        config, ("privacy.steps", "method.refresh", "method.moments", "method.name"), "public"
    )
