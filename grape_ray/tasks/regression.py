"""A task: fine-tune a Hugging Face model to say a number of a text, or of a pair of texts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grape_ray.data.arrays import Records
from grape_ray.data.columns import Table
from grape_ray.data.prepared import Columns
from grape_ray.storage import Json
from grape_ray.tasks.batches import batches
from grape_ray.tasks.text_pairs import TextPairTask


@dataclass(frozen=True)
class Regression(TextPairTask):
    """The loss is the squared error; the other fields are those of TextPairTask.

    Attributes:
        number_column: name of the column of numbers. A new head says numbers near 0 and each
            gradient is clipped, so numbers of the size of 1 are learned best: bring larger ones
            there by a public factor.
    """

    number_column: str = "score"
    name: str = "regression"

    @property
    def columns(self) -> Columns:
        texts = self.input_columns.texts
        return Columns((*texts, self.number_column), texts, texts)

    def check(self, table: Table, facts: Json) -> None:
        rows = np.flatnonzero(~np.isfinite(table.numbers(self.number_column)))
        fix = "correct them, or leave those rows out"
        table.refuse_rows(
            f"numbers of column '{self.number_column}' that are not finite", rows, "numbers", fix
        )

    def encode(self, table: Table, facts: Json) -> Records:
        return Records({**self.inputs(table), "labels": table.numbers(self.number_column)})

    def build_model(self, seed: int) -> nn.Module:
        model = self.with_head(1, seed)
        model.config.problem_type = "regression"
        return self.prepared_model(model, seed)

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (self.logits(model, batch)[:, 0].float() - batch["labels"]).square()

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Mean squared and absolute error, and the correlations of Pearson and of Spearman: of what
        is said with what is so; NaN where all of one are the same.
        """
        from scipy.stats import pearsonr, spearmanr

        measures: list[tuple[str, Any]] = [("pearson", pearsonr), ("spearman", spearmanr)]
        said, truth = self._said(model, records), records.array("labels").astype(np.float64)
        error = said - truth
        found = {"mse": float(np.square(error).mean()), "mae": float(np.abs(error).mean())}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a constant
            for name, measure in measures:
                found[name] = float(measure(said, truth)[0]) if len(said) > 1 else float("nan")
        return found

    def predict(self, model: nn.Module, records: Records) -> dict[str, list]:
        """For each record the number that the model says."""
        return {"number": self._said(model, records).tolist()}

    def _said(self, model: nn.Module, records: Records) -> np.ndarray:
        said = torch.empty(len(records), dtype=torch.float64)
        for indices, batch in batches(self, model, records):
            said[indices] = self.logits(model, batch)[:, 0].double().cpu()
        return said.numpy()
