"""OPT-1.3B fine-tuned on SST-2 with DP-GRAPE, a GPU or several a trial."""

from __future__ import annotations

from typing import Any

from ray import tune

from grape_ray.tuning import SweepStudy
from pipelines.sst2 import sst2


def space() -> dict[str, Any]:
    return {
        "method.rank": tune.choice([16, 64, 256]),
        "privacy.clip_norm": tune.loguniform(0.1, 10.0),
        "method.learning_rate": tune.loguniform(1e-5, 1e-3),
        "method.refresh": tune.choice([50, 200]),
    }


def study() -> SweepStudy:
    """Trials of 300 steps of 256 records, compared first after 50. GLUE's validation phrases count
    as public.
    """
    settings = [
        "task.name=sst2-opt", "task.model=facebook/opt-1.3b", "privacy.expected_batch_size=256",
        "privacy.steps=300", "privacy.spare_steps=100", "method.rank=64",
        "method.learning_rate=1e-4", "method.warmup_steps=20", "method.refresh=200",
        "performance.num_workers=1", "performance.use_gpu=true", "performance.micro_batch_size=16",
        "performance.eval_every=50",
    ]  # fmt: skip
    return SweepStudy(
        config=sst2().override(settings),
        tunable=("method.rank", "method.side", "method.refresh", "method.moments",
        "method.learning_rate", "method.weight_decay",
                 "privacy.clip_norm", "privacy.clipping", "privacy.steps"),
        score_source="public",
    )  # fmt: skip
