"""Rank, clip norm and learning rate of DP-GRAPE on handwritten digits; minutes on two cores."""

from __future__ import annotations

from ray import tune

from grape_ray.tuning import SweepStudy
from grape_ray.tuning.spaces import Space
from pipelines.digits_vit import digits_vit


def space() -> Space:
    return {
        "method.rank": tune.choice([4, 8, 16, 32]),
        "privacy.clip_norm": tune.loguniform(0.1, 10.0),
        "method.learning_rate": tune.loguniform(2e-3, 5e-2),
    }


def study() -> SweepStudy:
    """Trials of 200 steps, compared first after 25. The held-out images count as public."""
    settings = [
        "privacy.steps=200",
        "privacy.spare_steps=25",
        "performance.eval_every=25",
        "performance.charge_chunk=25",
    ]
    return SweepStudy(
        config=digits_vit().override(settings),
        tunable=(
            "method.name", "method.rank", "method.side", "method.refresh", "method.moments",
            "method.optimizer", "method.learning_rate", "method.schedule", "privacy.clip_norm",
            "privacy.clipping", "privacy.steps", "task.width",
        ),
        score_source="public",
    )  # fmt: skip
