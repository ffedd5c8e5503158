"""Shape and optimizer of the vision transformer on handwritten digits, among all methods of one
mechanism.
"""

from __future__ import annotations

from typing import Any

from ray import tune

from grape_ray.tuning import SweepStudy
from pipelines.digits_vit import digits_vit


def space() -> dict[str, Any]:
    return {
        "method.name": tune.choice(["grape", "dp_adam", "ghost", "bookkeeping", "dp_galore"]),
        "task.width": tune.choice([32, 64]),
        "task.layers": tune.choice([1, 2]),
        "privacy.clip_norm": tune.loguniform(0.3, 3.0),
        "privacy.clipping": tune.choice(["flat", "automatic"]),
        "method.learning_rate": tune.loguniform(2e-3, 3e-2),
    }


def study() -> SweepStudy:
    """Trials of 150 steps, compared first after 25. The held-out images count as public."""
    settings = [
        "privacy.steps=150",
        "privacy.spare_steps=25",
        "performance.eval_every=25",
        "performance.charge_chunk=25",
    ]
    return SweepStudy(
        config=digits_vit().override([*settings, "method.rank=8"]),
        tunable=("method.name", "method.rank", "method.learning_rate", "method.moments",
        "privacy.clip_norm", "privacy.clipping",
                 "task.width", "task.layers", "task.heads", "task.mlp_ratio"),
        score_source="public",
    )  # fmt: skip
