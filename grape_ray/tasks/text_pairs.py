"""What the tasks on a text, or on a pair of texts, have in common: one pass of a model that reads
both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grape_ray.data.arrays import Ragged, Records
from grape_ray.data.columns import Table
from grape_ray.data.prepared import Columns
from grape_ray.errors import ConfigError, nearest
from grape_ray.models.hugging_face import (
    check_vocabulary,
    explaining_long_texts,
    load_classifier,
    tokens_of,
)
from grape_ray.models.pooling import with_mean_pooling
from grape_ray.tasks.dataset_task import TextTask


@dataclass(frozen=True)
class TextPairTask(TextTask):
    """The other fields are those of TextTask.

    Attributes:
        pair_column: name of a second column of texts, such as the hypothesis beside a premise.
        dropout: whether the model's dropout is on in training.
        pooling: what the head reads of the last layer: `first`, the first token, as transformers
            does, or `mean`, of all tokens, which sentence encoders were trained for
            (`models.pooling`).
    """

    pair_column: str = ""
    dropout: bool = False
    pooling: str = "first"

    def check_fields(self) -> None:
        super().check_fields()
        if self.pooling not in ("first", "mean"):
            fix = nearest(str(self.pooling), ("first", "mean"))
            raise ConfigError("task.pooling", self.pooling, "first or mean", fix)

    @property
    def input_columns(self) -> Columns:
        """The columns that `predict` reads."""
        texts = (self.text_column, *filter(None, [self.pair_column]))
        return Columns(texts, texts, texts)

    def inputs(self, table: Table) -> dict[str, Ragged]:
        """Token ids of the texts; of pairs with the type of each token, where the model has
        types.
        """
        pairs = table.texts(self.pair_column) if self.pair_column else None
        found = self.load_tokenizer()(
            table.texts(self.text_column),
            pairs,
            truncation=True,
            max_length=self.max_tokens,
            padding=False,
        )
        names = ["input_ids", *(["token_type_ids"] if pairs and "token_type_ids" in found else [])]
        return {name: Ragged.of(found[name]) for name in names}

    def with_head(self, outputs: int, seed: int) -> Any:
        """The model with a head of so many numbers."""
        model: Any = load_classifier(self.model, outputs, seed, self.dropout, weights=self.weights)
        check_vocabulary(model, tokens_of(self.load_tokenizer()), self.model)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.pad_token()
        return with_mean_pooling(model, self.model) if self.pooling == "mean" else model

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        ids, mask = records.sequences("input_ids").padded(indices, self.pad_token())
        batch = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in records.columns:
            batch["token_type_ids"] = records.sequences("token_type_ids").padded(indices, 0)[0]
        if "labels" in records.columns:
            batch["labels"] = torch.from_numpy(records.array("labels")[indices])
        return batch

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, outputs) of a batch, whose `labels` are not looked at."""
        with explaining_long_texts(model, batch["input_ids"].shape[1]):
            return model(**{k: v for k, v in batch.items() if k != "labels"}).logits
