"""Heads on frozen models: what the head reads of a record is computed once, and not again at every
step that draws the record.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grape_ray.data.arrays import Records
from grape_ray.tasks.image_classification import ImageClassification
from grape_ray.tasks.regression import Regression
from grape_ray.tasks.task import Data, Task, evaluating, to_device, views_of
from grape_ray.tasks.text_classification import TextClassification

_MOST_BYTES = 1 << 30  # of features in memory; with more every step reads its records anew
# A class derived from one of these may look at what the batches of it no longer hold.
_KINDS = (TextClassification, Regression, ImageClassification)
_ROWS = 64  # read in one pass


def on_features(task: Task, model: nn.Module, data: Data) -> Task:
    """The task on features that are kept, where nothing but a head is trained: one module that
    reads one vector a record, and gives the logits. Any other task as it is.

    Args:
        model: on its device, not sharded.
    """
    head = _head(model)
    known = type(task) in _KINDS and views_of(task) == 1
    if not known or not head or any(module.training for module in model.modules()):
        return task
    made: Any = _OnFeatures(task, model, head)
    width = made.width(data.train, np.arange(min(2, len(data.train))))
    rows = len(data.train) + len(data.validation)
    return made if 0 < width * rows * 4 <= _MOST_BYTES else task


def _head(model: nn.Module) -> str:
    """The name of the innermost module that holds all that is trained, and nothing else; empty
    where there is none.
    """
    named = model.named_parameters(remove_duplicate=False)  # by each name of a tied weight
    names = [name for name, param in named if param.requires_grad]
    shared = names[0].split(".")[:-1] if names else []
    for name in names:
        parts = name.split(".")
        while parts[: len(shared)] != shared:
            shared.pop()
    head = ".".join(shared)
    if not head or any(not p.requires_grad for p in model.get_submodule(head).parameters()):
        return ""
    return head


@dataclass
class _Kept:
    """Features (N, width) of some records, where they are known: (N,) bool. The records are held
    here, so that no others can get their id.
    """

    records: Records
    known: np.ndarray
    features: Tensor = field(default_factory=lambda: torch.empty(0))


class _OnFeatures:
    """A task whose batches hold `features` (B, width), what the head reads, in place of what the
    model reads; losses and metrics are the task's own methods, given these batches.

    Features are those of the weights' own precision, whatever the steps' is, and are rounded as in
    the batch in which they were first computed. They stay in memory, as the records do.
    """

    def __init__(self, task: Any, model: nn.Module, head: str):
        self._task, self._model, self._head = task, model, head
        self._device = next(model.parameters()).device
        self._kept: dict[int, _Kept] = {}

    def __getattr__(self, name: str) -> Any:
        """The task's own; methods are given this in place of the task."""
        method = getattr(type(self._task), name, None)
        return method.__get__(self) if inspect.isfunction(method) else getattr(self._task, name)

    def width(self, records: Records, indices: np.ndarray) -> int:
        """Of a record's features; 0 where the head does not read one vector a record, or its answer
        is not the model's.
        """
        with torch.no_grad():
            features, logits = self._read(records, indices)
            if features is None or features.shape[:-1] != (len(indices),):
                return 0
            again = self.logits(self._model, {"features": features})
        return features.shape[1] if torch.equal(again, logits) else 0

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        """Features of the records, and their labels."""
        if id(records) not in self._kept:
            self._kept[id(records)] = _Kept(records, np.zeros(len(records), bool))
        kept = self._kept[id(records)]
        missing = np.unique(indices[~kept.known[indices]])
        if len(missing):
            self._fill(kept, missing)
        batch = {"features": kept.features[torch.from_numpy(indices)]}
        if "labels" in records.columns:
            batch["labels"] = torch.from_numpy(records.array("labels")[indices])
        return batch

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model.get_submodule(self._head)(batch["features"])

    def _fill(self, kept: _Kept, missing: np.ndarray) -> None:
        """Computes the features of some more records."""
        order = kept.records.by_length(missing)
        with evaluating(self._model), torch.no_grad():
            for start in range(0, len(order), _ROWS):
                rows = order[start : start + _ROWS]
                found, _ = self._read(kept.records, rows)
                assert found is not None
                if not len(kept.features):
                    shape = len(kept.records), found.shape[1]
                    kept.features = found.new_empty(shape, device="cpu")
                kept.features[torch.from_numpy(rows)] = found.cpu()
        kept.known[missing] = True

    def _read(self, records: Records, indices: np.ndarray) -> tuple[Tensor | None, Tensor]:
        """What the head reads of some records, None where it is not one tensor, once; and the
        logits.
        """
        read: list[tuple[object, ...]] = []
        head = self._model.get_submodule(self._head)
        hook = head.register_forward_pre_hook(lambda _, given: read.append(given))
        try:
            batch = to_device(self._task.collate(records, indices), self._device)
            logits = self._task.logits(self._model, batch)
        finally:
            hook.remove()
        one = read[0][0] if len(read) == 1 and len(read[0]) == 1 else None
        return (one if isinstance(one, Tensor) else None), logits
