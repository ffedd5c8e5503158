"""A task: fine-tune a Hugging Face model to tag each token of a text, such as names or parts of
speech.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch.nn.functional as F
from torch import Tensor, nn

from grape_ray.data.arrays import Ragged, Records
from grape_ray.data.columns import Table, is_text
from grape_ray.data.prepared import Columns
from grape_ray.errors import DataError
from grape_ray.models.extras import needed
from grape_ray.models.hugging_face import (
    check_vocabulary,
    explaining_long_texts,
    load_classifier,
    tokens_of,
)
from grape_ray.storage import Json
from grape_ray.tasks.batches import batches, padded_batch
from grape_ray.tasks.dataset_task import TokenizedTask, tokenizer_of
from grape_ray.tasks.label_names import NamedLabels
from grape_ray.tasks.token_losses import IGNORE

_AT_ONCE = 4096  # rows looked at together


@dataclass(frozen=True)
class TokenClassification(NamedLabels, TokenizedTask):
    """An example is one text: its tags are learned together, as the mean of their losses. A token
    is tagged at its first word piece; the other fields are those of NamedLabels and TokenizedTask.

    Attributes:
        tokens_column: name of a column of lists of texts. tags_column: of a column of as long
            lists of their tags: texts, or integers that are places in `labels`.
        max_tokens: word pieces; tokens beyond them are neither learned nor tagged.
        dropout: whether the model's dropout is on in training.
    """

    tokens_column: str = "tokens"
    tags_column: str = "tags"
    dropout: bool = False
    name: str = "token-classification"

    @property
    def columns(self) -> Columns:
        named = (self.tokens_column, self.tags_column)
        return Columns(named, filled=named)

    @property
    def input_columns(self) -> Columns:
        """The columns that `predict` reads."""
        return Columns((self.tokens_column,), filled=(self.tokens_column,))

    def load_tokenizer(self) -> Any:
        """The model's tokenizer, which reads each token as a word of its own: after a space, where
        it looks at spaces.
        """
        found = tokenizer_of(self.model)
        if getattr(found, "add_prefix_space", None) is not False:
            return found
        return tokenizer_of(self.model, add_prefix_space=True)

    def facts(self, train: Table, names: Callable[[str], Sequence[str]]) -> Json:
        found = self.declared_labels() or names(self.tags_column)
        if not found:
            seen = {str(tag) for part in _parts(train) for row in self._tags(part) for tag in row}
            integers = all(name.lstrip("-").isdigit() for name in seen)
            found = sorted(seen, key=int if integers else None)
        if len(found) < 2:
            got, fix = f"{len(found)} tag", "name the column of tags"
            raise DataError(f"column '{self.tags_column}'", got, "at least two tags", fix)
        return {"labels": list(found)}

    def check(self, table: Table, facts: Json) -> None:
        known = self._places(facts["labels"])
        ragged, unknown, missing = [], [], []
        pairs = (zip(self._tokens(part), self._tags(part)) for part in _parts(table))
        for row, (words, marks) in enumerate(itertools.chain.from_iterable(pairs)):
            if len(words) != len(marks):
                ragged.append(row)
            elif None in words or None in marks:
                missing.append(row)
            elif not known.keys() >= set(marks):
                unknown.append(row)
        fix = "correct them, or leave those rows out"
        expected = "a tag for each token"
        table.refuse_rows("tags of another number than tokens", np.array(ragged), expected, fix)
        table.refuse_rows("missing tokens or tags", np.array(missing), expected, fix)
        fix = "name all of them in task.labels, or correct the rows"
        table.refuse_rows("another tag", np.array(unknown), "tags that have a name", fix)

    def encode(self, table: Table, facts: Json) -> Records:
        """Word pieces, which token each begins, and its tag."""
        found, places = self.inputs(table), self._places(facts["labels"])
        words, rows = found["words"], self._tags(table)
        tags = [
            [IGNORE if word < 0 else places[row[word]] for word in words[index].tolist()]
            for index, row in enumerate(rows)
        ]
        lost = np.array([i for i, row in enumerate(tags) if all(tag == IGNORE for tag in row)])
        fix = "raise task.max_tokens, or drop those rows"
        table.refuse_rows("no token that the tokenizer reads", lost, "at least one", fix)
        return Records({**found, "labels": Ragged.of(tags)})

    def inputs(self, table: Table) -> dict[str, np.ndarray | Ragged]:
        """Word pieces, the number of the token that each begins (-1 of others), and how many tokens
        there are.
        """
        tokens = self._tokens(table)
        found = self.load_tokenizer()(
            tokens, is_split_into_words=True, truncation=True, max_length=self.max_tokens
        )
        return {
            "input_ids": Ragged.of(found["input_ids"]),
            "words": Ragged.of([_firsts(found.word_ids(row)) for row in range(len(tokens))]),
            "count": np.array([len(row) for row in tokens], dtype=np.int64),
        }

    def build_model(self, seed: int) -> nn.Module:
        classes = len(self.label_names())
        model = load_classifier(
            self.model, classes, seed, self.dropout, "TokenClassification", self.weights
        )
        check_vocabulary(model, tokens_of(self.load_tokenizer()), self.model)
        self.name_labels(model)
        return self.prepared_model(model, seed)

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        return padded_batch(records, indices, self.pad_token(), IGNORE)

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self._loss(_logits(model, batch), batch["labels"])

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Precision, recall and F1 of whole entities, as the tags say them (IOB, such as B-PER);
        accuracy of tags, and mean loss.
        """
        measures = needed("seqeval.metrics", "task token-classification", "metrics")
        names, truth, said, loss = self.label_names(), [], [], 0.0
        for _, batch in batches(self, model, records):
            logits, labels = _logits(model, batch), batch["labels"]
            loss += float(self._loss(logits, labels).double().sum())
            for right, chosen in zip(labels.cpu(), logits.argmax(-1).cpu()):
                learned = right != IGNORE
                truth.append([names[tag] for tag in right[learned].tolist()])
                said.append([names[tag] for tag in chosen[learned].tolist()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tags that are not IOB, one by one
            found = {
                part: float(getattr(measures, f"{part}_score")(truth, said, zero_division=0))
                for part in ("precision", "recall", "f1")
            }
        accuracy = float(measures.accuracy_score(truth, said))
        return {**found, "accuracy": accuracy, "loss": loss / len(records)}

    def predict(self, model: nn.Module, records: Records) -> dict[str, list]:
        """For each record a tag a token; None for tokens beyond `max_tokens`."""
        names, words = self.label_names(), records.sequences("words")
        tags: list[list[object]] = [[None] * int(count) for count in records.array("count")]
        for indices, batch in batches(self, model, records):
            chosen = _logits(model, batch).argmax(-1).cpu().tolist()
            for index, row in zip(indices, chosen):
                for word, tag in zip(words[index].tolist(), row):
                    if word >= 0:
                        tags[index][word] = names[tag]
        return {"tags": tags}

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B,): mean over an example's tagged tokens."""
        losses = F.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            self.label_weights(logits),
            ignore_index=IGNORE,
            reduction="none",
        )
        return losses.view(labels.shape).sum(1) / (labels != IGNORE).sum(1)

    def _tokens(self, table: Table) -> list[list[str]]:
        return table.lists(self.tokens_column, is_text, "texts")

    def _tags(self, table: Table) -> list[list[object]]:
        def is_tag(kind: pa.DataType) -> bool:
            return is_text(kind) or pa.types.is_integer(kind)

        return table.lists(self.tags_column, is_tag, "texts or integers")

    def _places(self, names: Sequence[str]) -> dict[object, int]:
        """The label of each tag, as a text, or as an integer: the number that a name is, or else
        the place of one.
        """
        places: dict[object, int] = {name: place for place, name in enumerate(names)}
        numbers = all(name.lstrip("-").isdigit() for name in names)
        return places | {
            (int(name) if numbers else place): place for place, name in enumerate(names)
        }


def _firsts(words: Sequence[int | None]) -> list[int]:
    """Which token each word piece begins; -1 of special ones and of the others."""
    before: list[int | None] = [None, *words]
    return [-1 if word is None or word == last else word for last, word in zip(before, words)]


def _parts(table: Table) -> Iterator[Table]:
    for start in range(0, len(table), _AT_ONCE):
        yield table.slice(start, _AT_ONCE)


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T, L), fp32."""
    with explaining_long_texts(model, batch["input_ids"].shape[1]):
        return model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.float()
