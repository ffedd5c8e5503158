"""A task: fine-tune a causal language model on plain texts, on prompts and answers, or on chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from grape_ray.data.arrays import Ragged, Records
from grape_ray.data.columns import Table
from grape_ray.data.prepared import Columns
from grape_ray.errors import ConfigError
from grape_ray.models.hugging_face import (
    check_vocabulary,
    explaining_long_texts,
    load_language_model,
    tokens_of,
)
from grape_ray.storage import Json
from grape_ray.tasks import chats
from grape_ray.tasks.batches import batches
from grape_ray.tasks.dataset_task import TextTask, tokenizer_of
from grape_ray.tasks.generation import generated
from grape_ray.tasks.text_metrics import by_source, generation_metrics, token_metrics

BYTES = "bytes"
_PAD, _BEGIN, _END, _FIRST_BYTE = 0, 1, 2, 3
_BYTE_TOKENS = _FIRST_BYTE + 256
_IGNORE = -100
_EVALUATE_ROWS = 8
_LOSSES = ("mean", "sum")


@dataclass(frozen=True)
class TextGeneration(TextTask):
    """The model is a decoder. An example's tokens give one loss and are clipped together; the
    other fields are those of TextTask.

    Attributes:
        tokenizer: hub name or folder; empty is the model's own; `bytes` reads UTF-8 (259 ids),
            which no data had to be seen for.
        prompt_column: read but not learned; empty where texts are learned whole.
        messages_column: in place of texts, a column of chats: lists of messages with `role` and
            `content`, written by the tokenizer's own template; what the assistant says is learned.
        max_tokens: longer examples are cut at the end, and lose no more than that: a prompt too
            long leaves no text and is refused.
        loss: `mean` over an example's learned tokens, or their `sum`.
        max_new_tokens: of a text that is generated.
        evaluate_generations: after so many different prompts of the validation records a text is
            generated, and compared with all their texts, as they were cut, by BLEU and ROUGE-L; 0
            does neither.
    """

    tokenizer: str = ""
    prompt_column: str = ""
    messages_column: str = ""
    max_tokens: int = 1024
    loss: str = "mean"
    max_new_tokens: int = 128
    evaluate_generations: int = 0
    name: str = "text-generation"

    def check_fields(self) -> None:
        super().check_fields()
        self.check_at_least(max_tokens=2, max_new_tokens=1, evaluate_generations=0)
        if self.loss not in _LOSSES:
            raise ConfigError("task.loss", self.loss, "one of " + ", ".join(_LOSSES))

    def check_together(self) -> None:
        super().check_together()
        if self.messages_column and (self.prompt_column or self.tokenizer == BYTES):
            got = "task.prompt_column" if self.prompt_column else "task.tokenizer=bytes"
            fix = "unset one: chats are written by the tokenizer's own template"
            raise ConfigError(f"task.messages_column with {got}", None, "one of them", fix)
        if self.evaluate_generations and not self.prompt_column:
            fix = "name the column of prompts, or set task.evaluate_generations=0"
            got = f"{self.evaluate_generations} without prompts"
            raise ConfigError("task.evaluate_generations", got, "task.prompt_column", fix)

    @property
    def columns(self) -> Columns:
        if self.messages_column:
            return Columns((self.messages_column,), filled=(self.messages_column,))
        named = tuple(filter(None, [self.prompt_column, self.text_column]))
        return Columns(named, named)

    @property
    def input_columns(self) -> Columns:
        """The columns from which `predict` generates."""
        if self.messages_column:
            return self.columns
        named = (self.prompt_column or self.text_column,)
        return Columns(named, named)

    def reader(self) -> str:
        return BYTES if self.tokenizer == BYTES else super().reader()

    def load_tokenizer(self) -> Any:
        """The tokenizer; None of bytes."""
        if self.tokenizer == BYTES:
            return None
        if self.tokenizer:
            return tokenizer_of(self.tokenizer, "task.tokenizer")
        return tokenizer_of(self.model)

    def encode(self, table: Table, facts: Json) -> Records:
        """Token ids, and which of them are learned."""
        if self.messages_column:
            whole, learned = chats.encoded(table, self.messages_column, self.load_tokenizer())
        else:
            whole, learned = self._encoded_texts(table)
        whole = [ids[: self.max_tokens] for ids in whole]
        learned = [marks[: self.max_tokens] for marks in learned]
        lost = np.array([i for i, marks in enumerate(learned) if not any(marks)])
        table.refuse_rows(
            "nothing to learn",
            lost,
            f"a prompt of fewer than max_tokens = {self.max_tokens} tokens, and a text after it",
            "raise task.max_tokens, or drop those rows",
        )
        return Records({"input_ids": Ragged.of(whole), "learned": Ragged.of(learned, np.uint8)})

    def inputs(self, table: Table) -> dict[str, Ragged]:
        """Token ids of what `predict` reads: a prompt, or a chat up to the assistant's turn."""
        if self.messages_column:
            return {
                "input_ids": Ragged.of(
                    chats.prompts(table, self.messages_column, self.load_tokenizer())
                )
            }
        texts = table.texts(self.input_columns.named[0])
        return {"input_ids": Ragged.of([[*self._begin(), *ids] for ids in self._ids(texts, False)])}

    def build_model(self, seed: int) -> nn.Module:
        tokens = _BYTE_TOKENS if self.tokenizer == BYTES else tokens_of(self.load_tokenizer())
        model = check_vocabulary(load_language_model(self.model, seed), tokens, self.model)
        return self.prepared_model(model, seed)

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        ids, _ = records.sequences("input_ids").padded(indices, _PAD)
        return {
            "input_ids": ids,
            "learned": records.sequences("learned").padded(indices, 0)[0].bool(),
        }

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        losses, learned = _token_losses(model, batch)
        total = losses.sum(1)
        return total if self.loss == "sum" else total / learned.sum(1).clamp(min=1)

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Mean cross-entropy a learned token, in nats, its exponential, and what the texts that the
        model writes are worth.
        """
        found = token_metrics(
            _token_losses(model, batch)
            for _, batch in batches(self, model, records, _EVALUATE_ROWS)
        )
        if not self.evaluate_generations:
            return found
        ids = records.sequences("input_ids")
        starts = [int(records.sequences("learned")[i].argmax()) for i in range(len(records))]
        prompts = [ids[i][:start] for i, start in enumerate(starts)]
        groups = by_source([prompt.tobytes() for prompt in prompts], self.evaluate_generations)
        texts = self._written(model, [prompts[group[0]].tolist() for group in groups])
        told = [self._texts([ids[i][starts[i] :].tolist() for i in group]) for group in groups]
        return {**found, **generation_metrics(texts, told)}

    def predict(self, model: nn.Module, records: Records) -> dict[str, list]:
        """The text that the model writes after each prompt, by the most likely token each time."""
        ids = records.sequences("input_ids")
        return {"text": self._written(model, [ids[index].tolist() for index in range(len(ids))])}

    def _written(self, model: nn.Module, prompts: list[list[int]]) -> list[str]:
        end = _END if self.tokenizer == BYTES else self.load_tokenizer().eos_token_id
        return self._texts(generated(model, prompts, self.max_new_tokens, end))

    def _texts(self, answers: list[list[int]]) -> list[str]:
        """Tokens as texts, without special ones."""
        if self.tokenizer != BYTES:
            return list(self.load_tokenizer().batch_decode(answers, skip_special_tokens=True))
        return [
            bytes(t - _FIRST_BYTE for t in ids if t >= _FIRST_BYTE).decode(errors="replace")
            for ids in answers
        ]

    def _encoded_texts(self, table: Table) -> tuple[list[list[int]], list[list[int]]]:
        texts = self._ids(table.texts(self.text_column), end=True)
        prompts: Sequence[list[int]] = [[]] * len(texts)
        if self.prompt_column:
            prompts = self._ids(table.texts(self.prompt_column), end=False)
        begin = self._begin()
        heads = [[*begin, *prompt] for prompt in prompts]
        return (
            [[*head, *text] for head, text in zip(heads, texts)],
            [[0] * len(head) + [1] * len(text) for head, text in zip(heads, texts)],
        )

    def _begin(self) -> list[int]:
        """The token that the tokenizer puts before a text, if it has one."""
        token = _BEGIN if self.tokenizer == BYTES else self.load_tokenizer().bos_token_id
        return [] if token is None else [token]

    def _ids(self, texts: list[str], end: bool) -> list[list[int]]:
        """Token ids without special tokens, but for the last one if `end`."""
        if self.tokenizer == BYTES:
            return [
                [b + _FIRST_BYTE for b in text.encode()] + ([_END] if end else []) for text in texts
            ]
        tokenizer = self.load_tokenizer()
        found = tokenizer(
            texts, add_special_tokens=False, truncation=True, max_length=self.max_tokens
        )["input_ids"]
        last = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
        return [[*ids, *last] for ids in found]


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
