"""OPT on the DP-GRAPE paper's tasks that have labels, a GPU or several a trial."""

from __future__ import annotations

from typing import Literal

from ray import tune

from grape_ray.tuning import SweepStudy
from grape_ray.tuning.spaces import Space
from pipelines.opt_tasks import opt_tasks


def space(size: str = "1.3b") -> Space:
    return {
        "method.rank": tune.choice([8, 16, 32] if size == "tiny" else [16, 32, 64]),
        "privacy.clip_norm": tune.loguniform(0.1, 20.0),
        "method.learning_rate": tune.loguniform(3e-5, 3e-3),
    }


def study(
    size: Literal["125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "tiny"] = "1.3b",
    dataset: Literal["sst2", "boolq"] = "sst2",
) -> SweepStudy:
    """Trials as long as the pipeline's run, compared first after a tenth. The validation records
    count as public.
    """
    config = opt_tasks(size, dataset)
    return SweepStudy(
        config=config.override([f"performance.eval_every={config.privacy.steps // 10}"]),
        tunable=(
            "method.rank", "method.side", "method.refresh", "method.moments",
            "method.learning_rate", "method.weight_decay", "privacy.clip_norm", "privacy.clipping",
            "privacy.steps",
        ),
        score_source="public",
    )  # fmt: skip
