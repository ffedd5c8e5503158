"""A task: fine-tune a Hugging Face sequence classifier on texts, or pairs of texts, and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from grape_ray.data.arrays import Records
from grape_ray.data.columns import Table
from grape_ray.data.prepared import Columns
from grape_ray.storage import Json
from grape_ray.tasks.labels import LabelledTask
from grape_ray.tasks.text_pairs import TextPairTask


@dataclass(frozen=True)
class TextClassification(LabelledTask, TextPairTask):
    """The fields are those of LabelledTask and TextPairTask."""

    name: str = "text-classification"

    @property
    def columns(self) -> Columns:
        texts = self.input_columns.texts
        filled = (*texts, self.label_column) if not self.multi_label else texts
        return Columns((*texts, self.label_column), texts, filled, self.unlabelled)

    def encode(self, table: Table, facts: Json) -> Records:
        return Records({**self.inputs(table), **self.targets(table, facts)})

    def build_model(self, seed: int) -> nn.Module:
        model = self.with_head(len(self.label_names()), seed)
        if self.multi_label:
            model.config.problem_type = "multi_label_classification"
        self.name_labels(model)
        return self.prepared_model(model, seed)

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return TextPairTask.logits(self, model, batch)
