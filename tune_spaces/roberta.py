"""RoBERTa-large on a GLUE task, all layers, against the validation records' own budget: both splits
are private.
"""

from __future__ import annotations

from typing import Any

from ray import tune

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.tasks.text_classification import TextClassification
from grape_ray.tuning import SweepStudy


def space() -> dict[str, Any]:
    return {
        "method.rank": tune.choice([16, 32, 64, 128]),
        "privacy.clip_norm": tune.loguniform(0.1, 10.0),
        "method.learning_rate": tune.loguniform(5e-5, 2e-3),
        "method.side": tune.choice(["in", "smaller"]),
    }


def study() -> SweepStudy:
    """Trials of 1,000 steps of 1,024 records; accuracy is noised, and costs the validation records
    epsilon 0.5 in all.
    """
    return SweepStudy(
        config=Config(
            task=TextClassification(
                name="qnli-roberta",
                model="FacebookAI/roberta-large",
                data="hf://datasets/nyu-mll/glue/qnli/train-*.parquet",
                validation="hf://datasets/nyu-mll/glue/qnli/validation-*.parquet",
                text_column="question",
                max_tokens=128,
            ),
            privacy=Privacy(epsilon=3.0, delta=1e-6, expected_batch_size=1024, steps=1000,
            spare_steps=250),
            method=Method(name="grape", rank=64, refresh=200, learning_rate=5e-4, warmup_steps=50,
            schedule="linear"),
            performance=Performance(micro_batch_size=64, charge_chunk=50, eval_every=100,
            num_workers=1, use_gpu=True),
        ),
        tunable=("method.name", "method.rank", "method.side", "method.refresh", "method.moments",
        "method.learning_rate",
                 "method.weight_decay", "privacy.clip_norm", "privacy.clipping", "privacy.steps"),
        score_source="private",
        score_epsilon=0.5,
        score_delta=1e-6,
    )  # fmt: skip
