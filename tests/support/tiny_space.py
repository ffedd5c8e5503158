"""A tune space over the task that trains in milliseconds."""

from __future__ import annotations

import os
from typing import Any

from ray import tune

from grape_ray.tuning import SweepStudy
from tests.support.tiny import tiny


def space() -> dict[str, Any]:
    return {
        "method.rank": tune.choice([4, 8]),
        "privacy.clip_norm": tune.loguniform(0.3, 3.0),
        "method.learning_rate": tune.loguniform(3e-3, 3e-2),
    }


def study() -> SweepStudy:
    """Twelve steps, compared every fourth; the environment may make the steps slow and the scores
    private.
    """
    config = tiny(slow_s=float(os.environ.get("TINY_SLOW_S", "0"))).override(
        ["performance.eval_every=4", "performance.charge_chunk=3", "privacy.spare_steps=12"]
    )
    tunable = (
        "method.rank",
        "method.learning_rate",
        "method.name",
        "privacy.clip_norm",
        "privacy.steps",
    )
    return SweepStudy(config, tunable, os.environ.get("TINY_SCORES", "public"), score_epsilon=4.0)
