"""Handwritten digits (MNIST) with a small convolutional network from scratch, by DP-GRAPE."""

from __future__ import annotations

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.tasks.image_classification import ImageClassification


def conv_mnist() -> Config:
    """Epsilon 3 for one image: 600 steps of 2,048, rank 32, the first convolution in full.

    All settings are ours; docs/choosing.md has the figures. Other images of 28 x 28:
    `--set task.data=FILE --set task.validation=FILE`.
    """
    return Config(
        task=ImageClassification(
            name="conv-mnist",
            model="scratch:conv_net",
            data="ylecun/mnist",
            validation="test",
            image_column="image",
            label_column="label",
            classes=10,
        ),
        privacy=Privacy(
            epsilon=3.0,
            delta=1e-5,
            expected_batch_size=2048,
            steps=600,
            spare_steps=25,
            clip_norm=1.0,
        ),
        method=Method(
            name="grape",
            rank=32,
            learning_rate=1e-2,
            schedule="linear",
            warmup_steps=30,
            project_min_numel=4096,
        ),
        performance=Performance(
            micro_batch_size=512,
            charge_chunk=25,
            checkpoint_every=200,
            eval_every=200,
            threads_per_worker=1,
        ),
    )
