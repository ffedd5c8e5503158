"""Small images with a small convolutional network from scratch, by DP-GRAPE: MNIST and CIFAR-10."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.tasks.image_classification import ImageClassification


def conv_images(dataset: Literal["mnist", "cifar10"] = "mnist") -> Config:
    """Epsilon 3 for one image: 600 steps of 2,048, rank 32, the first convolution in full.

    All settings are ours; docs/choosing.md has the figures. Other images of the same size:
    `--set task.data=FILE --set task.validation=FILE --set task.image_column=image`.

    Args:
        dataset: of the hub. CIFAR-10 takes a network of twice the width, at epsilon 8, rank 64 with
            momentum of lifted updates, and clip norm 10.
    """
    base = Config(
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
            project_min_numel=7000,
        ),
        performance=Performance(
            micro_batch_size=512,
            charge_chunk=25,
            checkpoint_every=200,
            eval_every=200,
            threads_per_worker=1,
        ),
    )
    if dataset == "mnist":
        return base
    return replace(
        base,
        task=replace(
            base.task,
            name="conv-cifar10",
            model="scratch:conv_net?image_size=32&filters=[32,64]&hidden_size=64",
            data="uoft-cs/cifar10",
            image_column="img",
        ),
        privacy=replace(base.privacy, epsilon=8.0, clip_norm=10.0),
        method=replace(base.method, rank=64, moments="lifted"),
    )
