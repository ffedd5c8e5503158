"""Digits by many hands: 2,000 writers with 20 images each, of which all are protected together.

Each image is one of scikit-learn's handwritten digits in its writer's slant, width, height and pen,
so nothing is downloaded. The records of one writer have something in common, which is what a
guarantee by writer hides and one by record does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.data.arrays import Records
from grape_ray.data.fingerprints import fingerprint_arrays
from grape_ray.data.units import Units
from grape_ray.errors import ConfigError, nearest
from grape_ray.tasks.task import Data
from pipelines.digits_vit import TRAIN_RECORDS, DigitsVit, windows

UNIT = "writer"


@dataclass(frozen=True)
class Writers(DigitsVit):
    """Digits of 8x8 pixels, each in the hand of one of many writers.

    Attributes:
        writers, images_per_writer: of the training set; 100 other writers, who write other digits,
            are for validation.
    """

    writers: int = 2000
    images_per_writer: int = 20
    name: str = "writers"

    def load(self, unit: str = "") -> Data:
        """With `unit="writer"`, whose each image is."""
        if unit not in ("", UNIT):
            raise ConfigError("privacy.unit", unit, UNIT, nearest(unit, [UNIT]))
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        order = np.random.default_rng(self.split_seed).permutation(len(digits.target))
        images = digits.images[order].astype(np.float32) / 16
        labels = digits.target[order].astype(np.int64)
        seen, held = slice(0, TRAIN_RECORDS), slice(TRAIN_RECORDS, None)
        train, validation = (
            _written(images[part], labels[part], count, self.images_per_writer, seed)
            for part, count, seed in ((seen, self.writers, 1), (held, 100, 2))
        )
        codes = np.repeat(np.arange(self.writers), self.images_per_writer)
        return Data(
            train=train,
            validation=validation,
            dataset_id=fingerprint_arrays(train.array("pixel_values"), train.array("labels")),
            public=True,
            units=Units.of(codes) if unit else None,
        )


def _written(images: np.ndarray, labels: np.ndarray, writers: int, each: int, seed: int) -> Records:
    """So many images of each writer, one writer's after the other's."""
    generator = np.random.default_rng(seed)
    picked = generator.integers(0, len(images), writers * each)
    width, height, slant, pen = generator.normal(0, [[0.12], [0.12], [0.3], [0.25]], (4, writers))
    hand = np.zeros((writers, 2, 3), dtype=np.float32)
    hand[:, 0, 0], hand[:, 1, 1], hand[:, 0, 1] = np.exp(width), np.exp(height), slant
    grid = functional.affine_grid(
        torch.from_numpy(hand.repeat(each, 0)), [len(picked), 1, 8, 8], align_corners=False
    )
    paper = torch.from_numpy(images[picked]).unsqueeze(1)
    drawn = functional.grid_sample(paper, grid, align_corners=False)[:, 0].numpy()
    drawn = drawn ** np.exp(pen).repeat(each).astype(np.float32)[:, None, None]
    # sixteen shades, as the digits have, so that rounding in the drawing tells no datasets apart
    shades = np.round(drawn * 16).astype(np.float32) / 8 - 1
    return Records({"pixel_values": windows(shades), "labels": labels[picked]})


def writers() -> Config:
    """DP-GRAPE at epsilon 8 for a writer with all their images."""
    return Config(
        task=Writers(),
        privacy=Privacy(
            epsilon=8.0, delta=1e-5, unit=UNIT, examples_per_unit=4, expected_batch_size=256,
            steps=200, clip_norm=1.0,
        ),
        method=Method(
            name="grape", rank=16, refresh=100, learning_rate=0.01, schedule="linear",
            project_min_numel=1024, dense=("*embeddings*", "classifier.*"),
        ),
        performance=Performance(
            micro_batch_size=256, charge_chunk=50, checkpoint_every=100, eval_every=50,
            threads_per_worker=1,
        ),
    )  # fmt: skip
