"""Handwritten digits with a small vision transformer: real data that comes with scikit-learn, so
nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.data.arrays import Records
from grape_ray.data.fingerprints import fingerprint_arrays
from grape_ray.errors import ConfigError
from grape_ray.tasks.task import Data, classification_loss, classification_metrics

TRAIN_RECORDS = 1437
_WINDOW, _STRIDE, _GRID = 4, 2, 4


@dataclass(frozen=True)
class DigitsVit:
    """Digits of 8x8 pixels, seen through overlapping windows of 4x4 at a 4x4 grid of places: a ViT
    with one token a window.

    Plain 2x2 patches reach about four points less at the same budget: a window sees a stroke, a
    patch does not.

    Attributes:
        width, layers, heads, mlp_ratio: of the transformer. init_std: of its initial weights.
        split_seed: of the fixed split into 1,437 training and 360 validation images.
    """

    width: int = 64
    layers: int = 1
    heads: int = 4
    mlp_ratio: int = 2
    init_std: float = 0.1
    split_seed: int = 0
    name: str = "digits-vit"
    bounded_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def load(self) -> Data:
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            fix = "pip install 'grape-ray[demo]'"
            what = "the digits come with scikit-learn"
            raise ConfigError(what, "no such module", "scikit-learn", fix) from error

        digits: Any = load_digits()
        order = np.random.default_rng(self.split_seed).permutation(len(digits.target))
        images = (digits.images[order].astype(np.float32) / 8.0) - 1.0
        labels = digits.target[order].astype(np.int64)
        pixels = windows(images)
        train, held = slice(0, TRAIN_RECORDS), slice(TRAIN_RECORDS, None)
        return Data(
            train=Records({"pixel_values": pixels[train], "labels": labels[train]}),
            validation=Records({"pixel_values": pixels[held], "labels": labels[held]}),
            dataset_id=fingerprint_arrays(images[train], labels[train]),
            public=True,
        )

    def build_model(self, seed: int) -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.width * self.mlp_ratio,
            image_size=_GRID,
            patch_size=1,
            num_channels=_WINDOW * _WINDOW,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=self.init_std,
        )
        config.num_labels = 10
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return ViTForImageClassification(config).eval()

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        return {
            name: torch.from_numpy(records.array(name)[indices])
            for name in ("pixel_values", "labels")
        }

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return classification_loss(model, batch)

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        return classification_metrics(self, model, records, batch_size=len(records))

    def save(self, model: nn.Module, folder: Path) -> None:
        from grape_ray.models.hugging_face import save_pretrained

        save_pretrained(model, folder)


def windows(images: np.ndarray) -> np.ndarray:
    """Images (N, 8, 8) as overlapping windows: (N, 16 pixels of a window, 4, 4 places), with a
    border of paper around the image.
    """
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=-1.0)
    views = np.lib.stride_tricks.sliding_window_view(padded, (_WINDOW, _WINDOW), axis=(1, 2))[
        :, ::_STRIDE, ::_STRIDE
    ]
    return np.ascontiguousarray(views.reshape(len(images), _GRID, _GRID, -1).transpose(0, 3, 1, 2))


def digits_vit() -> Config:
    """DP-GRAPE at epsilon 8: every attention and MLP weight trained in 16 coordinates a side, each
    step on the whole dataset.

    With few records the whole dataset is the best batch: the noise is added to a sum over all of
    them, and a step takes 0.1 s.
    """
    return Config(
        task=DigitsVit(),
        privacy=Privacy(
            epsilon=8.0, delta=1e-5, expected_batch_size=TRAIN_RECORDS, steps=300, clip_norm=1.0
        ),
        method=Method(
            name="grape",
            rank=16,
            learning_rate=0.01,
            schedule="linear",
            project_min_numel=1024,
            dense=("*embeddings*", "classifier.*"),
        ),
        performance=Performance(
            micro_batch_size=256,
            charge_chunk=50,
            checkpoint_every=100,
            eval_every=50,
            threads_per_worker=1,
        ),
    )
