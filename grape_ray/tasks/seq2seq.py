"""A task: fine-tune an encoder-decoder, such as T5 or BART, on sources and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from grape_ray.data.arrays import Ragged, Records
from grape_ray.data.columns import Table
from grape_ray.data.prepared import Columns
from grape_ray.models.hugging_face import (
    check_vocabulary,
    explaining_long_texts,
    load_language_model,
    tokens_of,
)
from grape_ray.storage import Json
from grape_ray.tasks import token_losses
from grape_ray.tasks.batches import batches, padded_batch
from grape_ray.tasks.dataset_task import TokenizedTask
from grape_ray.tasks.generation import generated
from grape_ray.tasks.text_metrics import by_source, generation_metrics, token_metrics

_EVALUATE_ROWS = 16


@dataclass(frozen=True)
class Seq2Seq(TokenizedTask):
    """An example is one source and one target; the other fields are those of TokenizedTask.

    Attributes:
        source_column, target_column: names of the columns of texts.
        prefix: put before each source, as T5 expects it: `summarize: `.
        max_tokens: longer sources are cut. max_target_tokens: longer targets are cut.
        loss: `mean` over an example's target tokens, or their `sum`.
        dropout: whether the model's dropout is on in training.
        max_new_tokens: of a text that is generated.
        evaluate_generations: for so many different sources of the validation records a text is
            generated, and compared with all their targets by BLEU and ROUGE-L; 0 does neither.
    """

    source_column: str = "source"
    target_column: str = "target"
    prefix: str = ""
    max_target_tokens: int = 128
    loss: str = "mean"
    dropout: bool = False
    max_new_tokens: int = 128
    evaluate_generations: int = 32
    name: str = "seq2seq"

    def check_fields(self) -> None:
        super().check_fields()
        self.check_at_least(max_target_tokens=2, max_new_tokens=1, evaluate_generations=0)
        token_losses.check_reduction(self.loss)

    @property
    def columns(self) -> Columns:
        named = (self.source_column, self.target_column)
        return Columns(named, named, named)

    @property
    def input_columns(self) -> Columns:
        """The columns that `predict` reads."""
        return Columns((self.source_column,), (self.source_column,), (self.source_column,))

    def encode(self, table: Table, facts: Json) -> Records:
        """Token ids of sources and targets, and the targets as they are (UTF-8), for tokens may
        not say all of a text.
        """
        texts, tokenizer = table.texts(self.target_column), self.load_tokenizer()
        found = tokenizer(text_target=texts, truncation=True, max_length=self.max_target_tokens)
        targets = [_ended(ids, tokenizer.eos_token_id) for ids in found["input_ids"]]
        return Records(
            {
                **self.inputs(table),
                "labels": Ragged.of(targets),
                "reference": Ragged.of_bytes(text.encode() for text in texts),
            }
        )

    def inputs(self, table: Table) -> dict[str, Ragged]:
        """Token ids of the sources."""
        texts = [self.prefix + text for text in table.texts(self.source_column)]
        found = self.load_tokenizer()(texts, truncation=True, max_length=self.max_tokens)
        return {"input_ids": Ragged.of(found["input_ids"])}

    def build_model(self, seed: int) -> nn.Module:
        model = load_language_model(self.model, seed, "Seq2SeqLM", self.weights)
        check_vocabulary(model, tokens_of(self.load_tokenizer()), self.model)
        return self.prepared_model(model.train(self.dropout), seed)

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        return padded_batch(records, indices, self.pad_token(), token_losses.IGNORE)

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return token_losses.of_examples(*_token_losses(model, batch), self.loss)

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Mean cross-entropy a target token, in nats, its exponential, and what the texts that the
        model writes are worth.
        """
        found = token_metrics(
            _token_losses(model, batch)
            for _, batch in batches(self, model, records, _EVALUATE_ROWS)
        )
        if not self.evaluate_generations:
            return found
        ids = records.sequences("input_ids")
        sources = [ids[index].tobytes() for index in range(len(ids))]
        groups = by_source(sources, self.evaluate_generations)
        texts = self._written(model, records, [group[0] for group in groups])
        references = records.sequences("reference")
        told = [[references[i].tobytes().decode() for i in group] for group in groups]
        return {**found, **generation_metrics(texts, told)}

    def predict(self, model: nn.Module, records: Records) -> dict[str, list]:
        """The text that the model writes for each source, by the most likely token each time."""
        return {"text": self._written(model, records, range(len(records)))}

    def _written(self, model: nn.Module, records: Records, indices: Sequence[int]) -> list[str]:
        ids, tokenizer = records.sequences("input_ids"), self.load_tokenizer()
        sources = [ids[index].tolist() for index in indices]
        answers = generated(model, sources, self.max_new_tokens, tokenizer.eos_token_id)
        return list(tokenizer.batch_decode(answers, skip_special_tokens=True))


def _ended(ids: list[int], end: int | None) -> list[int]:
    """A target that says where it ends, where the tokenizer has a token for it."""
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy (B, T) of each target token, zero where there is none, and where there is one.

    Targets are padded at their end and the decoder is causal, so no token of one sees padding.
    """
    labels, network = batch["labels"], cast(Any, model)
    with explaining_long_texts(model, max(batch["input_ids"].shape[1], labels.shape[1])):
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=network.prepare_decoder_input_ids_from_labels(labels=labels),
            use_cache=False,
        ).logits.float()
    return token_losses.of_targets(logits, labels)
