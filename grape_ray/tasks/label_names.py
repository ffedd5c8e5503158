"""The labels of a task that chooses among some: their names, their number, their weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from grape_ray.errors import ConfigError
from grape_ray.tasks.dataset_task import DatasetTask, warn_of_labels
from grape_ray.tasks.task import Data

_MOST_CLASSES = 1_000_000
_Task = TypeVar("_Task", bound="NamedLabels")


@dataclass(frozen=True)
class NamedLabels(DatasetTask):
    """Something is labelled; the other fields are those of DatasetTask.

    Attributes:
        labels: their names, in the model's order; none has them read from the training records:
            they are public then, like the model that holds them.
        classes: in place of names, the number of labels that are integers from 0 on.
        class_weights: a factor of the loss for each label; none is 1 for all.
    """

    labels: tuple[str, ...] = ()
    classes: int = 0
    class_weights: tuple[float, ...] = ()

    def resolved(self: _Task, data: Data) -> _Task:
        if self.declared_labels():
            return self
        labels = tuple(data.facts["labels"])
        warn_of_labels(self, labels)
        return dataclasses.replace(self, labels=labels)

    def declared_labels(self) -> tuple[str, ...]:
        """The names that the fields say."""
        return self.labels or tuple(str(label) for label in range(self.classes))

    def label_names(self) -> tuple[str, ...]:
        """The names of the labels; read from the records where no field says them."""
        return self.declared_labels() or tuple(self.prepared().facts["labels"])

    def check_fields(self) -> None:
        super().check_fields()
        self.check_at_least(classes=0)
        if self.classes == 1 or self.classes > _MOST_CLASSES:
            expected = f"0, or at least 2 and at most {_MOST_CLASSES}"
            fix = "count the labels: the head has a row for each"
            raise ConfigError("task.classes", self.classes, expected, fix)
        if len(set(self.labels)) != len(self.labels) or len(self.labels) == 1:
            got = ", ".join(self.labels)
            raise ConfigError("task.labels", got, "two names or more, each once", "correct them")
        if any(not 0 <= weight < float("inf") for weight in self.class_weights):
            got = list(self.class_weights)
            raise ConfigError("task.class_weights", got, "numbers >= 0", "correct them")

    def check_together(self) -> None:
        super().check_together()
        if self.labels and self.classes not in (0, len(self.labels)):
            got, fix = f"{self.classes} with {len(self.labels)} task.labels", "unset task.classes"
            raise ConfigError("task.classes", got, "as many as there are names", fix)
        weights, count = self.class_weights, len(self.declared_labels())
        if weights and count and len(weights) != count:
            raise ConfigError(
                "task.class_weights", len(weights), f"a factor for each of {count} labels", "count"
            )

    def name_labels(self, model: Any) -> None:
        """Writes the labels' names into a Hugging Face model's configuration."""
        names = self.label_names()
        if names != tuple(str(label) for label in range(len(names))):
            model.config.id2label = dict(enumerate(names))
            model.config.label2id = {name: index for index, name in enumerate(names)}

    def label_weights(self, logits: Tensor) -> Tensor | None:
        """The labels' factors (L,), of the logits' type; None where all are 1."""
        if not self.class_weights:
            return None
        return torch.tensor(self.class_weights, device=logits.device, dtype=logits.dtype)
