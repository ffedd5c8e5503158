"""A task: fine-tune a causal language model on prompts and answers, or on plain texts, from Parquet
data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grape_ray.data import tables
from grape_ray.data.arrays import Ragged, Records
from grape_ray.errors import DataError
from grape_ray.models.hugging_face import (
    check_vocabulary,
    explaining_long_texts,
    load_causal_lm,
    save_pretrained,
    tokens_of,
)
from grape_ray.tasks.task import Data, evaluating, to_device
from grape_ray.tasks.text_tables import TextTables, tokenizer_of

BYTES = "bytes"
_PAD, _BEGIN, _END, _FIRST_BYTE = 0, 1, 2, 3
_BYTE_TOKENS = _FIRST_BYTE + 256
_IGNORE = -100
_EVALUATE_ROWS = 8


@dataclass(frozen=True)
class TextGeneration(TextTables):
    """The model is a decoder. An example's tokens are summed into one loss and clipped together;
    the other fields are those of TextTables.

    Attributes:
        tokenizer: hub name or folder; empty is the model's own; `bytes` reads UTF-8 (259 ids),
            which no data had to be seen for.
        prompt_column: read but not learned; empty where texts are learned whole.
        max_tokens: longer examples are cut at the end, and lose no more than that: a prompt too
            long leaves no text and is refused.
        validation_limit: keep the first so many validation rows; 0 keeps all.
    """

    tokenizer: str = ""
    prompt_column: str = ""
    max_tokens: int = 1024
    validation_limit: int = 0
    name: str = "text-generation"

    def __post_init__(self) -> None:
        self.check_at_least(max_tokens=2, limit=0, validation_limit=0)

    def load(self) -> Data:
        train, validation = self._table(self.train), self._table(self.validation)
        return Data(
            train=self._records(_first(train, self.limit), self.train),
            validation=self._records(_first(validation, self.validation_limit), self.validation),
            # a part of the table spends from the whole table's budget
            dataset_id=tables.fingerprint(train),
            public=self.public,
            columns=tables.fingerprint_columns(train),
        )

    def build_model(self, seed: int) -> nn.Module:
        tokens = _BYTE_TOKENS if self.tokenizer == BYTES else tokens_of(self._read_by())
        return check_vocabulary(load_causal_lm(self.model, seed), tokens, self.model)

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        ids, mask = records.sequences("input_ids").padded(indices, _PAD)
        position = torch.arange(ids.shape[1])
        learned = mask.bool() & (
            position >= torch.from_numpy(records.array("starts")[indices])[:, None]
        )
        return {"input_ids": ids, "learned": learned}

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        losses, learned = _token_losses(model, batch)
        return losses.sum(1) / learned.sum(1).clamp(min=1)

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Mean cross-entropy a learned token, in nats, and its exponential."""
        total, count = 0.0, 0
        device = next(model.parameters()).device
        with evaluating(model), torch.no_grad():
            order = records.by_length(np.arange(len(records)))
            for start in range(0, len(order), _EVALUATE_ROWS):
                losses, learned = _token_losses(
                    model,
                    to_device(self.collate(records, order[start : start + _EVALUATE_ROWS]), device),
                )
                total, count = total + float(losses.double().sum()), count + int(learned.sum())
        loss = total / max(count, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}

    def save(self, model: nn.Module, folder: Path) -> None:
        save_pretrained(model, folder)
        if self.tokenizer != BYTES:
            self._read_by().save_pretrained(folder)

    def _read_by(self) -> Any:
        """The tokenizer; not of bytes."""
        return (
            tokenizer_of(self.tokenizer, "task.tokenizer")
            if self.tokenizer
            else tokenizer_of(self.model)
        )

    def _table(self, url: str) -> pa.Table:
        return tables.read_table(url, [c for c in (self.prompt_column, self.text_column) if c])

    def _records(self, table: pa.Table, url: str) -> Records:
        """Token ids, and for each example where its learned part begins."""
        texts = self._ids(tables.texts(table, self.text_column, url), end=True)
        prompts = (
            self._ids(tables.texts(table, self.prompt_column, url), end=False)
            if self.prompt_column
            else [[]] * len(texts)
        )
        begin = [_BEGIN] if self.tokenizer == BYTES else _begin(self._read_by())
        whole, starts = [], []
        for row, (prompt, text) in enumerate(zip(prompts, texts)):
            start = len(begin) + len(prompt)
            if start >= self.max_tokens:
                fix = "raise task.max_tokens, or drop the row"
                raise DataError(
                    f"row {row} of {url}",
                    f"a prompt of {start} tokens",
                    f"fewer than max_tokens = {self.max_tokens}",
                    fix,
                )
            whole.append([*begin, *prompt, *text][: self.max_tokens])
            starts.append(start)
        return Records(
            {"input_ids": Ragged.of(whole), "starts": np.asarray(starts, dtype=np.int64)}
        )

    def _ids(self, texts: list[str], end: bool) -> list[list[int]]:
        """Token ids without special tokens, but for the last one if `end`."""
        if self.tokenizer == BYTES:
            return [
                [b + _FIRST_BYTE for b in text.encode()] + ([_END] if end else []) for text in texts
            ]
        tokenizer = self._read_by()
        found = tokenizer(
            texts, add_special_tokens=False, truncation=True, max_length=self.max_tokens
        )["input_ids"]
        last = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
        return [[*ids, *last] for ids in found]


def _first(table: pa.Table, limit: int) -> pa.Table:
    return table.slice(0, limit) if limit else table


def _token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy (B, T) of each next token, zero where it is not learned, and which are learned.

    Examples are padded at their end and attention is causal, so no real token sees padding and no
    mask is needed.
    """
    targets = batch["input_ids"].masked_fill(~batch["learned"], _IGNORE)
    targets = F.pad(targets[:, 1:], (0, 1), value=_IGNORE)
    with explaining_long_texts(model, batch["input_ids"].shape[1]):
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits.float()
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORE, reduction="none"
    )
    return losses.view(targets.shape), targets != _IGNORE


def _begin(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before a text, if it has one."""
    token = tokenizer.bos_token_id
    return [] if token is None else [token]
