"""What the tasks of classification have in common: labels of rows, losses of logits, metrics,
predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from grape_ray.data.arrays import Records
from grape_ray.data.columns import Table, is_text
from grape_ray.errors import DataError
from grape_ray.storage import Json
from grape_ray.tasks.batches import batches
from grape_ray.tasks.label_names import NamedLabels


@dataclass(frozen=True)
class LabelledTask(NamedLabels):
    """Each row has a label, or several; the other fields are those of NamedLabels.

    Attributes:
        label_column: name of the column of labels: texts, integers or booleans; with `multi_label`
            lists of texts.
        multi_label: whether a row may have any number of labels, each learned by itself.
    """

    bounded_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    label_column: str = "label"
    multi_label: bool = False

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """The column in which -1 stands for no label: where the labels are declared, and -1 is none
        of them.
        """
        declared = self.declared_labels()
        known = bool(declared) and "-1" not in declared and not self.multi_label
        return (self.label_column,) if known else ()

    def facts(self, train: Table, names: Callable[[str], Sequence[str]]) -> Json:
        declared = self.declared_labels()
        if self.multi_label:
            found = declared or _names_in_lists(train, self.label_column)
        else:
            found = declared or names(self.label_column) or train.label_names(self.label_column)
        if len(found) < 2:
            got, fix = f"{len(found)} label", "name the column of labels"
            raise DataError(f"column '{self.label_column}'", got, "at least two labels", fix)
        return {"labels": list(found)}

    def check(self, table: Table, facts: Json) -> None:
        if self.classes and not self.labels and not table.holds_integers(self.label_column):
            what = f"column '{self.label_column}' of {table.place}"
            expected = f"integers from 0 to {self.classes - 1}, as task.classes says"
            fix = "set task.classes=0 to have the names of the labels read"
            raise DataError(what, "labels of another type", expected, fix)
        self.targets(table, facts)

    def targets(self, table: Table, facts: Json) -> dict[str, np.ndarray]:
        """The labels of some rows: int64 (N,), or float32 (N, L) of zeros and ones."""
        names = facts["labels"]
        if not self.multi_label:
            return {"labels": table.labels(self.label_column, names)}
        place = {name: index for index, name in enumerate(names)}
        rows = table.lists(self.label_column, is_text, "texts")
        unknown = [i for i, row in enumerate(rows) if not place.keys() >= set(row)]
        fix = "name all labels in task.labels, or correct the rows"
        table.refuse_rows("another label", np.array(unknown), "labels that have a name", fix)
        found = np.zeros((len(rows), len(names)), np.float32)
        for index, row in enumerate(rows):
            found[index, [place[name] for name in row]] = 1.0
        return {"labels": found}

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, L) of a batch, whose `labels` are not looked at."""
        raise NotImplementedError

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self.loss_of_logits(self.logits(model, batch), batch["labels"])

    def loss_of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B,): cross-entropy, or for several labels a row the mean of theirs, by class weight."""
        weights = self.label_weights(logits)
        if not self.multi_label:
            return F.cross_entropy(logits, labels, weights, reduction="none")
        losses = F.binary_cross_entropy_with_logits(logits, labels, weights, reduction="none")
        return losses.mean(1)

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Accuracy, macro-averaged F1 and mean loss; accuracy of several labels a row is the share
        of labels that are right.
        """
        from sklearn.metrics import f1_score

        truth, said, loss = [], [], 0.0
        for _, batch in batches(self, model, records):
            logits, labels = self.logits(model, batch).float(), batch["labels"]
            loss += float(self.loss_of_logits(logits, labels).double().sum())
            chosen = (logits > 0).long() if self.multi_label else logits.argmax(-1)
            truth.append(labels.long().cpu().numpy())
            said.append(chosen.cpu().numpy())
        silent: Any = {"zero_division": 0}  # its type stubs know of texts alone
        right, guessed = np.concatenate(truth), np.concatenate(said)
        return {
            "accuracy": float((right == guessed).mean()),
            "f1": float(f1_score(right, guessed, average="macro", **silent)),
            "loss": loss / len(records),
        }

    def predict(self, model: nn.Module, records: Records) -> dict[str, list]:
        """For each record its label, or list of labels, and the probability of each label by
        name.
        """
        names = self.label_names()
        labels: list[object] = [None] * len(records)
        chances: list[object] = [None] * len(records)
        for indices, batch in batches(self, model, records):
            logits = self.logits(model, batch).float()
            found = logits.sigmoid() if self.multi_label else logits.softmax(-1)
            for index, row in zip(indices, found.cpu().tolist()):
                likely = [name for name, p in zip(names, row) if p > 0.5]
                labels[index] = likely if self.multi_label else names[int(np.argmax(row))]
                chances[index] = dict(zip(names, row))
        return {"label": labels, "probabilities": chances}


def _names_in_lists(table: Table, column: str) -> tuple[str, ...]:
    rows = table.lists(column, is_text, "texts")
    return tuple(sorted({name for row in rows for name in row}))
