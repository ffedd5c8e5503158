"""DP-GRAPE on film reviews (SST-2) with a small pretrained encoder."""

from __future__ import annotations

from ray import tune

from grape_ray.tuning import SweepStudy
from grape_ray.tuning.spaces import Space
from pipelines.sst2 import sst2


def space() -> Space:
    return {
        "method.rank": tune.choice([4, 8, 16, 32, 64]),
        "privacy.clip_norm": tune.loguniform(0.5, 50.0),
        "method.learning_rate": tune.loguniform(1e-4, 4e-3),
        "method.refresh": tune.choice([1, 10, 100]),
        "method.moments": tune.choice(["keep", "reset", "transfer", "lifted"]),
    }


def study() -> SweepStudy:
    """Trials of 100 steps, compared first after 20. GLUE's validation phrases count as public."""
    return SweepStudy(
        config=sst2().override([
            "privacy.steps=100", "performance.eval_every=20", "performance.charge_chunk=20",
        ]),
        tunable=(
            "method.name", "method.rank", "method.side", "method.refresh", "method.moments",
            "method.learning_rate", "method.warmup_steps", "method.schedule", "method.weight_decay",
            "privacy.clip_norm", "privacy.clipping", "privacy.steps",
        ),
        score_source="public",
    )  # fmt: skip
