"""A task: fine-tune a causal language model on plain texts, on prompts and answers, or on chats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from grape_ray.data.arrays import Ragged, Records
from grape_ray.data.columns import Table
from grape_ray.data.prepared import Columns
from grape_ray.errors import ConfigError
from grape_ray.storage import Json
from grape_ray.tasks import chats, token_losses
from grape_ray.tasks.batches import batches
from grape_ray.tasks.dataset_task import TextTask
from grape_ray.tasks.decoders import BYTES, PAD, DecoderTask, learned_tokens, next_token_losses
from grape_ray.tasks.text_metrics import by_source, generation_metrics, token_metrics

_EVALUATE_ROWS = 8


@dataclass(frozen=True)
class TextGeneration(DecoderTask, TextTask):
    """An example's tokens give one loss and are clipped together; the other fields are those of
    DecoderTask and TextTask.

    Attributes:
        prompt_column: read but not learned; empty where texts are learned whole.
        messages_column: in place of texts, a column of chats: lists of messages with `role` and
            `content`, written by the tokenizer's own template; what the assistant says is learned.
        loss: `mean` over an example's learned tokens, or their `sum`.
        evaluate_generations: after so many different prompts of the validation records a text is
            generated, and compared with all their texts, as they were cut, by BLEU and ROUGE-L; 0
            does neither.
    """

    prompt_column: str = ""
    messages_column: str = ""
    loss: str = "mean"
    evaluate_generations: int = 0
    name: str = "text-generation"

    def check_fields(self) -> None:
        super().check_fields()
        self.check_at_least(evaluate_generations=0)
        token_losses.check_reduction(self.loss)

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

    def encode(self, table: Table, facts: Json) -> Records:
        """Token ids, and which of them are learned."""
        if self.messages_column:
            whole, learned = (
                [row[: self.max_tokens] for row in rows]
                for rows in chats.encoded(table, self.messages_column, self.load_tokenizer())
            )
        else:
            whole, learned = self._encoded_texts(table)
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
        return {"input_ids": Ragged.of(self.prompts(texts))}

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        ids, _ = records.sequences("input_ids").padded(indices, PAD)
        learned = records.sequences("learned").padded(indices, 0)[0].bool()
        return {"input_ids": ids, **learned_tokens(ids, learned)}

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        losses, learned = _losses(model, batch)
        return token_losses.of_examples(losses, learned, self.loss)

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Mean cross-entropy a learned token, in nats, its exponential, and what the texts that the
        model writes are worth.
        """
        found = token_metrics(
            _losses(model, batch) for _, batch in batches(self, model, records, _EVALUATE_ROWS)
        )
        if not self.evaluate_generations:
            return found
        ids = records.sequences("input_ids")
        starts = [int(records.sequences("learned")[i].argmax()) for i in range(len(records))]
        prompts = [ids[i][:start] for i, start in enumerate(starts)]
        groups = by_source([prompt.tobytes() for prompt in prompts], self.evaluate_generations)
        texts = self.written(model, [prompts[group[0]].tolist() for group in groups])
        told = [self.texts_of([ids[i][starts[i] :].tolist() for i in group]) for group in groups]
        return {**found, **generation_metrics(texts, told)}

    def _encoded_texts(self, table: Table) -> tuple[list[list[int]], list[list[int]]]:
        texts = table.texts(self.text_column)
        if self.prompt_column:
            return self.answered(self.prompts(table.texts(self.prompt_column)), texts)
        return self.answered([self.begin()] * len(texts), texts)


def _losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return next_token_losses(model, batch["input_ids"], batch["places"], batch["targets"])
