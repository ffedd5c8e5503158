"""Method, clip norm and learning rate of GPT-2 on E2E; `--set size=tiny` tunes generated pairs."""

from __future__ import annotations

from typing import Literal

from ray import tune

from grape_ray.tuning import SweepStudy
from grape_ray.tuning.spaces import Space
from pipelines.gpt2_e2e import gpt2_e2e


def space() -> Space:
    return {
        "method.name": tune.choice(["grape", "bookkeeping"]),
        "privacy.clip_norm": tune.loguniform(0.05, 2.0),
        "method.learning_rate": tune.loguniform(3e-4, 1e-2),
    }


def study(size: Literal["base", "medium", "large", "small", "tiny"] = "base") -> SweepStudy:
    """Trials as long as the pipeline's run, compared first after a tenth, by ROUGE-L of the texts
    that 64 prompts give. The validation pairs count as public.
    """
    config = gpt2_e2e(size)
    return SweepStudy(
        config=config.override(
            [f"performance.eval_every={config.privacy.steps // 10}", "task.evaluate_generations=64"]
        ),
        tunable=(
            "method.name", "method.rank", "method.refresh", "method.moments",
            "method.learning_rate", "method.schedule", "privacy.clip_norm", "privacy.clipping",
            "privacy.steps", "task.loss",
        ),
        score_source="public",
        metric="rouge_l",
    )  # fmt: skip
