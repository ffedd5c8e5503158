"""Sentiment of film reviews (GLUE SST-2): the upper half of a pretrained sentence encoder, and a
head, are fine-tuned.
"""

from __future__ import annotations

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.tasks.text_classification import TextClassification


def sst2() -> Config:
    """DP-GRAPE at epsilon 3 on 67,349 phrases: 150 steps of 4,096. docs/choosing.md says where the
    settings come from.

    Mind the unit: phrases of one sentence are separate records, so the guarantee is for a phrase,
    not for a review or its author. Data and model can be others:
    `--set task.data=FILE --set task.validation=FILE --set task.model=FOLDER`.
    """
    return Config(
        task=TextClassification(
            name="sst2",
            model="sentence-transformers/all-MiniLM-L6-v2",
            data="hf://datasets/nyu-mll/glue/sst2/train-*.parquet",
            validation="hf://datasets/nyu-mll/glue/sst2/validation-*.parquet",
            text_column="sentence",
            classes=2,
            max_tokens=64,
            pooling="mean",
            trainable=("upper-half", "classifier.*"),
        ),
        privacy=Privacy(
            epsilon=3.0,
            delta=1e-5,
            expected_batch_size=4096,
            steps=150,
            spare_steps=10,
            clip_norm=10.0,
        ),
        method=Method(
            name="grape",
            rank=16,
            moments="lifted",
            learning_rate=1.4e-3,
            rates=("classifier.*:4",),
            warmup_steps=8,
            schedule="linear",
        ),
        performance=Performance(
            micro_batch_size=128,
            precision="bf16",
            charge_chunk=25,
            checkpoint_every=25,
            eval_every=25,
            threads_per_worker=1,
        ),
    )
