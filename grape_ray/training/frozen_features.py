"""Frozen parts of a model read each record once: what they make of it is kept, and not computed
again at every step that draws the record.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from grape_ray.data.arrays import Records
from grape_ray.distributed.sharding import stacks
from grape_ray.tasks.image_classification import ImageClassification
from grape_ray.tasks.regression import Regression
from grape_ray.tasks.task import Data, Task, evaluating, to_device, views_of
from grape_ray.tasks.text_classification import TextClassification

_MOST_BYTES = 1 << 30  # of features in memory; with more every step reads its records anew
# A class derived from one of these may look at what the batches of it no longer hold.
_KINDS = (TextClassification, Regression, ImageClassification)
_ROWS = 64  # read in one pass


def on_features(task: Task, model: nn.Module, data: Data, half: bool) -> Task:
    """The task on features that are kept, where nothing but a head is trained (one module that
    reads one vector a record, and gives the logits), or the first blocks of a text's model are
    frozen. Any other task as it is.

    Args:
        model: on its device, not sharded. half: whether the steps' products are bfloat16, and so
            what is kept of every token.
    """
    known = type(task) in _KINDS and views_of(task) == 1
    if not known or any(module.training for module in model.modules()):
        return task
    if head := _head(model):
        made = _OnVectors(task, model, model.get_submodule(head), half=False)
    elif frozen := _frozen_blocks(model):
        made = _OnTokens(task, model, frozen, half)
    else:
        return task
    return cast(Task, made) if made.usable(data) else task


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


def _frozen_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks before the first that is trained, and that one; none where the model has several
    stacks of blocks, or begins with a trained one.
    """
    blocks = [list(stack) for stack in stacks(model)]
    if len(blocks) != 1:
        return []
    trained = [any(p.requires_grad for p in block.parameters()) for block in blocks[0]]
    first = trained.index(True) if True in trained else 0
    return blocks[0][: first + 1] if first else []


@dataclass
class _Kept:
    """The features of some records, None where they are not known yet. The records are held here,
    so that no others can get their id.
    """

    records: Records
    features: list[Tensor | None]


class _Enough(Exception):
    """What is kept has been computed; the rest of the model need not run."""


class _OnFeatures:
    """A task whose batches hold `features`, what the trained part of the model reads; losses and
    metrics are the task's own methods, given these batches.

    Features are rounded as in the batch in which they were first computed. They stay in memory, as
    the records do.
    """

    def __init__(self, task: Any, model: nn.Module, reader: nn.Module, half: bool):
        """Args: reader: the module whose first argument is kept. half: in bfloat16, or as it is."""
        self._task, self._model, self._reader, self._half = task, model, reader, half
        self._device = next(model.parameters()).device
        self._kept: dict[int, _Kept] = {}

    def __getattr__(self, name: str) -> Any:
        """The task's own; methods are given this in place of the task."""
        method = getattr(type(self._task), name, None)
        return method.__get__(self) if inspect.isfunction(method) else getattr(self._task, name)

    def usable(self, data: Data) -> bool:
        """Whether the features fit into memory, nothing before them is trained, and the rest of the
        model gives the whole model's answer, to the last bit, on the shortest and the longest
        record.
        """
        some = np.unique(data.train.extremes())
        read, logits = self._read(data.train, some)
        if read is None or read.requires_grad or not 0 < self._bytes(read, data) <= _MOST_BYTES:
            return False
        batch = self._batch(data.train, some, self._rows(data.train, some, read))
        again = self.logits(self._model, to_device(batch, self._device))
        return logits is not None and torch.equal(again, logits)

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        """`features` of the records, and what else the rest of the model reads."""
        if id(records) not in self._kept:
            self._kept[id(records)] = _Kept(records, [None] * len(records))
        kept = self._kept[id(records)]
        missing = [index for index in np.unique(indices) if kept.features[index] is None]
        if missing:
            self._fill(kept, np.array(missing))
        found = (kept.features[index] for index in indices)
        return self._batch(records, indices, [one for one in found if one is not None])

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Of the rest of the model."""
        raise NotImplementedError

    def _bytes(self, read: Tensor, data: Data) -> int:
        """Of all features; 0 where what the reader was given is not of that kind."""
        raise NotImplementedError

    def _rows(self, records: Records, indices: np.ndarray, read: Tensor) -> Sequence[Tensor]:
        """The features of each record, of what the reader was given of all."""
        raise NotImplementedError

    def _batch(
        self, records: Records, indices: np.ndarray, rows: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """A batch of the features of each record."""
        raise NotImplementedError

    def _fill(self, kept: _Kept, missing: np.ndarray) -> None:
        """Computes the features of some more records."""
        order = kept.records.by_length(missing)
        precision = torch.autocast(self._device.type, torch.bfloat16, enabled=self._half)
        with evaluating(self._model), torch.no_grad(), precision:
            for start in range(0, len(order), _ROWS):
                some = order[start : start + _ROWS]
                read, _ = self._read(kept.records, some, beyond=False)
                assert read is not None
                read = read.to("cpu", torch.bfloat16 if self._half else read.dtype)
                for index, row in zip(some, self._rows(kept.records, some, read)):
                    kept.features[index] = row

    def _read(
        self, records: Records, indices: np.ndarray, beyond: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """What the reader is given of some records, None where it is not one tensor, once; and the
        logits, if the model is to run `beyond`.
        """
        given: list[tuple[object, ...]] = []

        def keep(_: nn.Module, args: tuple[object, ...]) -> None:
            given.append(args)
            if not beyond:
                raise _Enough

        hook, logits = self._reader.register_forward_pre_hook(keep), None
        try:
            batch = to_device(self._task.collate(records, indices), self._device)
            logits = self._task.logits(self._model, batch)
        except _Enough:
            pass
        finally:
            hook.remove()
        one = given[0][0] if len(given) == 1 and given[0] else None
        return (one if isinstance(one, Tensor) else None), logits


class _OnVectors(_OnFeatures):
    """Where a head alone is trained: `features` (B, width) or (B, 1, width), of the weights' own
    precision, whatever the steps' is.
    """

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self._reader(batch["features"])

    def _bytes(self, read: Tensor, data: Data) -> int:
        rows = len(data.train) + len(data.validation)
        width = read[0].numel()
        return rows * width * read.element_size() if width == read.shape[-1] else 0

    def _rows(self, records: Records, indices: np.ndarray, read: Tensor) -> Sequence[Tensor]:
        return read.unbind()

    def _batch(
        self, records: Records, indices: np.ndarray, rows: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        batch = {"features": torch.stack(list(rows))}
        if "labels" in records.columns:
            batch["labels"] = torch.from_numpy(records.array("labels")[indices])
        return batch


class _OnTokens(_OnFeatures):
    """Where the first blocks are frozen: the task's own batches, and `features` (B, T, width), what
    the first trained block reads of each token. The blocks before it are passed over.
    """

    def __init__(self, task: Any, model: nn.Module, blocks: Sequence[nn.Module], half: bool):
        """Args: blocks: the frozen ones, and the first that is trained."""
        super().__init__(task, model, blocks[-1], half)
        self._frozen = blocks[:-1]

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        features = batch["features"].float() if self._half else batch["features"]
        own = {name: tensor for name, tensor in batch.items() if name != "features"}
        with contextlib.ExitStack() as restored:
            for block in self._frozen:
                restored.enter_context(_instead(block, lambda *_, **__: features))
            return self._task.logits(model, own)

    def _bytes(self, read: Tensor, data: Data) -> int:
        if read.ndim != 3 or "input_ids" not in data.train.columns:
            return 0
        tokens = [len(part.sequences("input_ids").values) for part in (data.train, data.validation)]
        return sum(tokens) * read.shape[2] * (2 if self._half else read.element_size())

    def _read(
        self, records: Records, indices: np.ndarray, beyond: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """None, too, where the last frozen block hands on something else, or more."""
        handed: list[object] = []
        hook = self._frozen[-1].register_forward_hook(lambda *call: handed.append(call[-1]))
        try:
            read, logits = super()._read(records, indices, beyond)
        finally:
            hook.remove()
        return (read if any(one is read for one in handed) else None), logits

    def _rows(self, records: Records, indices: np.ndarray, read: Tensor) -> Sequence[Tensor]:
        lengths = records.sequences("input_ids").lengths(indices)
        # copies, so that no padding stays in memory
        return [row[:length].clone() for row, length in zip(read, lengths.tolist())]

    def _batch(
        self, records: Records, indices: np.ndarray, rows: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        features = pad_sequence(list(rows), batch_first=True)
        return {**self._task.collate(records, indices), "features": features}


@contextlib.contextmanager
def _instead(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """A module with another forward pass for the time of a block."""
    own = module.__dict__.get("forward")  # of this very module, as recomputation gives it one
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
