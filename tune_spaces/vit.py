"""Rank, clip norm and learning rate of a vision transformer on images, over the grids of the
DP-GRAPE paper; `--set size=tiny` tunes it on digits.
"""

from __future__ import annotations

from typing import Literal

from ray import tune

from grape_ray.tuning import SweepStudy
from grape_ray.tuning.spaces import Space
from pipelines.vit_cifar10 import vit_cifar10


def space(size: str = "base") -> Space:
    return {
        "method.rank": tune.choice([8, 16, 32] if size == "tiny" else [16, 32, 64, 128]),
        "privacy.clip_norm": tune.loguniform(0.1, 10.0),
        "method.learning_rate": tune.loguniform(5e-4, 1e-2),
    }


def study(
    size: Literal["base", "small", "tiny"] = "base",
    dataset: Literal["cifar10", "cifar100", "mnist"] = "cifar10",
    pretrained: bool = True,
) -> SweepStudy:
    """Trials as long as the pipeline's run, compared first after a tenth. The test images count as
    public.
    """
    config = vit_cifar10(size, dataset, pretrained)
    return SweepStudy(
        config=config.override([f"performance.eval_every={config.privacy.steps // 10}"]),
        tunable=(
            "method.name", "method.rank", "method.side", "method.refresh", "method.moments",
            "method.learning_rate", "method.schedule", "privacy.clip_norm", "privacy.clipping",
            "privacy.steps", "task.views",
        ),
        score_source="public",
    )  # fmt: skip
