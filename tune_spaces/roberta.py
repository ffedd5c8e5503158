"""RoBERTa-Large on the DP-GRAPE paper's six tasks, against the validation records' own budget:
both splits are private.
"""

from __future__ import annotations

from typing import Literal

from ray import tune

from grape_ray.tuning import SweepStudy
from grape_ray.tuning.spaces import Space
from pipelines.roberta_glue import roberta_glue


def space(size: str = "large") -> Space:
    return {
        "method.rank": tune.choice([8, 16, 32] if size == "tiny" else [16, 32, 64, 128]),
        "privacy.clip_norm": tune.loguniform(0.1, 20.0),
        "method.learning_rate": tune.loguniform(5e-5, 5e-3),
        "method.side": tune.choice(["in", "smaller"]),
    }


def study(
    size: Literal["large", "base", "tiny"] = "large",
    dataset: Literal["sst2", "sst5", "snli", "mnli", "rte", "trec"] = "sst2",
    shots: int = 512,
) -> SweepStudy:
    """Trials as long as the pipeline's run, compared first after a tenth; accuracy is noised, and
    costs the validation records epsilon 0.5 in all.
    """
    config = roberta_glue(size, dataset, shots)
    return SweepStudy(
        config=config.override([f"performance.eval_every={config.privacy.steps // 10}"]),
        tunable=(
            "method.name", "method.rank", "method.side", "method.refresh", "method.moments",
            "method.learning_rate", "method.weight_decay", "privacy.clip_norm", "privacy.clipping",
            "privacy.steps",
        ),
        score_source="private",
        score_epsilon=0.5,
        score_delta=1e-6,
    )  # fmt: skip
