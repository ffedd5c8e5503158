"""A task: fine-tune a Hugging Face sequence classifier on a text column and a label column of
Parquet data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from grape_ray.data import tables
from grape_ray.data.arrays import Ragged, Records
from grape_ray.errors import ConfigError
from grape_ray.models.hugging_face import (
    check_vocabulary,
    explaining_long_texts,
    load_sequence_classifier,
    save_pretrained,
    tokens_of,
)
from grape_ray.tasks.task import Data, classification_loss, classification_metrics
from grape_ray.tasks.text_tables import TextTables, tokenizer_of

_MOST_CLASSES = 1_000_000
_TOKENIZE_ROWS = 4096  # texts handed to the tokenizer at a time


@dataclass(frozen=True)
class TextClassification(TextTables):
    """Each row of a table has a text and a label; the other fields are those of TextTables.

    Attributes:
        label_column: name of the column of labels, integers from 0 to classes - 1.
        classes: number of labels. max_tokens: longer texts are cut.
        dropout: whether the model's dropout is on in training.
    """

    label_column: str = "label"
    classes: int = 2
    max_tokens: int = 128
    dropout: bool = False
    name: str = "text-classification"
    bounded_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __post_init__(self) -> None:
        self.check_at_least(classes=2, max_tokens=1, limit=0)
        if self.classes > _MOST_CLASSES:
            raise ConfigError(
                "task.classes",
                self.classes,
                f"at most {_MOST_CLASSES}",
                "count the labels: the head has a row for each",
            )

    def load(self) -> Data:
        whole = tables.read_table(self.train, [self.text_column, self.label_column])
        table = whole.slice(0, self.limit) if self.limit else whole
        validation = tables.read_table(self.validation, [self.text_column, self.label_column])
        # Both are checked before the slow part, the tokenizer, begins.
        train_labels = tables.labels(table, self.label_column, self.train, self.classes)
        validation_labels = tables.labels(
            validation, self.label_column, self.validation, self.classes
        )
        train_texts = tables.texts(table, self.text_column, self.train)
        validation_texts = tables.texts(validation, self.text_column, self.validation)
        return Data(
            train=self._records(train_texts, train_labels),
            validation=self._records(validation_texts, validation_labels),
            # a part of the table spends from the whole table's budget
            dataset_id=tables.fingerprint(whole),
            public=self.public,
            columns=tables.fingerprint_columns(whole),
        )

    def _records(self, found: list[str], labels: np.ndarray) -> Records:
        """Texts as token ids."""
        tokenizer = tokenizer_of(self.model)
        ids: list[list[int]] = []
        for start in range(0, len(found), _TOKENIZE_ROWS):
            block = tokenizer(
                found[start : start + _TOKENIZE_ROWS],
                truncation=True,
                max_length=self.max_tokens,
                padding=False,
            )
            ids.extend(block["input_ids"])
        return Records({"input_ids": Ragged.of(ids), "labels": labels})

    def build_model(self, seed: int) -> nn.Module:
        model: Any = load_sequence_classifier(self.model, self.classes, seed, self.dropout)
        check_vocabulary(model, tokens_of(tokenizer_of(self.model)), self.model)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self._fill
        return model

    @property
    def _fill(self) -> int:
        tokenizer = tokenizer_of(self.model)
        return (
            tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else (tokenizer.eos_token_id or 0)
        )

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        ids, mask = records.sequences("input_ids").padded(indices, self._fill)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.from_numpy(records.array("labels")[indices]),
        }

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with explaining_long_texts(model, batch["input_ids"].shape[1]):
            return classification_loss(model, batch)

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        with explaining_long_texts(
            model, int(np.diff(records.sequences("input_ids").offsets).max())
        ):
            return classification_metrics(self, model, records)

    def save(self, model: nn.Module, folder: Path) -> None:
        save_pretrained(model, folder)
        tokenizer_of(self.model).save_pretrained(folder)
