"""A task whose exceptions quote a record, at a place of its life that is chosen, and a tune space
over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from grape_ray.config.schema import Config
from grape_ray.data.arrays import Records
from grape_ray.errors import DataError
from grape_ray.tasks.task import Data
from grape_ray.tuning import SweepStudy
from tests.support.tiny import Tiny, tiny

RECORD = "ZQXJRECORD"
PLACES = ["load", "preflight", "loss", "collate", "evaluate", "exit", "own", "chained", "group"]


@dataclass(frozen=True)
class Quoting(Tiny):
    """Tiny, which fails `at` a place."""

    at: str = "loss"
    public: bool = False
    name: str = "quoting"

    def load(self) -> Data:
        self._fail("load")
        return super().load()

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        if len(indices) > 3:
            self._fail("collate")
        return super().collate(records, indices)

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        self._fail("preflight")
        if len(batch["x"]) > 3:  # a batch of training, and not the few records of the preflight
            for place in ("loss", "exit", "own", "chained", "group"):
                self._fail(place)
        return super().per_example_loss(model, batch)

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        self._fail("evaluate")
        return super().evaluate(model, records)

    def _fail(self, place: str) -> None:
        text = f"bad record: {RECORD}"
        if place != self.at:
            return
        if place == "exit":
            raise SystemExit(text)
        if place == "own":
            raise DataError(text, RECORD)
        if place == "group":
            raise ExceptionGroup(text, [ValueError(text)])
        if place == "chained":
            try:
                raise ValueError(text)
            except ValueError as error:
                raise DataError(text) from error
        raise ValueError(text)


def quoting() -> Config:
    return replace(tiny(), task=Quoting())


def space() -> dict[str, Any]:
    from ray import tune

    return {"method.rank": tune.choice([4, 8])}


def study() -> SweepStudy:
    return SweepStudy(quoting().override(["performance.eval_every=4"]), ("method.rank",), "public")
