"""A task that trains in milliseconds on real digits, with switches for what the tests of the loop
and of Ray need.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.data.arrays import Records
from grape_ray.data.fingerprints import fingerprint_arrays
from grape_ray.data.units import Units
from grape_ray.tasks.task import Data


@dataclass(frozen=True)
class Tiny:
    """Digits with one hidden layer.

    Attributes:
        records: how many training images. dropout: of the hidden layer.
        trace: a file to which each micro-batch appends a line with its process id. slow_s: how long
            each micro-batch sleeps.
    """

    records: int = 200
    dropout: float = 0.0
    trace: str = ""
    slow_s: float = 0.0
    public: bool = True
    name: str = "tiny"
    bounded_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def load(self, unit: str = "") -> Data:
        """With a unit, 101 of them with 0 to 8 records each."""
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = (images[: self.records + 50] / 16).astype(np.float32)
        labels = labels[: self.records + 50].astype(np.int64)
        train = Records({"x": images[: self.records], "labels": labels[: self.records]})
        validation = Records({"x": images[self.records :], "labels": labels[self.records :]})
        return Data(
            train,
            validation,
            fingerprint_arrays(images[: self.records], labels[: self.records]),
            self.public,
            units=Units.of(np.arange(self.records) ** 2 % 101, 101) if unit else None,
        )

    def build_model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            layers = [nn.Linear(64, 32), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(32, 10)]
            return nn.Sequential(*layers).train(self.dropout > 0)

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        if self.trace:
            with open(self.trace, "a") as file:
                file.write(json.dumps({"pid": os.getpid(), "rows": len(indices)}) + "\n")
        time.sleep(self.slow_s)
        return {name: torch.from_numpy(records.array(name)[indices]) for name in ("x", "labels")}

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        with torch.inference_mode():
            right = model(torch.from_numpy(records.array("x"))).argmax(-1) == torch.from_numpy(
                records.array("labels")
            )
        return {"accuracy": float(right.float().mean())}

    def save(self, model: nn.Module, folder: Path) -> None:
        folder.mkdir(parents=True)
        torch.save(model.state_dict(), folder / "weights.pt")


def tiny(steps: int = 12, **task) -> Config:
    """Twelve steps at a quarter of the records, checkpointed every fourth."""
    return Config(
        task=Tiny(**task),
        privacy=Privacy(epsilon=8.0, expected_batch_size=50, steps=steps, spare_steps=12),
        method=Method(
            rank=8, refresh=5, moments="transfer", learning_rate=0.01, project_min_numel=1024
        ),
        performance=Performance(
            micro_batch_size=32, charge_chunk=3, checkpoint_every=4, threads_per_worker=1
        ),
    )
