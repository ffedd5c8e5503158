"""What a run trains: the protocol that joins a model to its data."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from grape_ray.data.arrays import Records
from grape_ray.data.fingerprints import column_fingerprints, fingerprint_records
from grape_ray.data.units import Units
from grape_ray.engines.losses import PerExampleLoss
from grape_ray.errors import ConfigError
from grape_ray.privacy.redaction import run_redacted
from grape_ray.storage import Json


@dataclass(frozen=True)
class Data:
    """A dataset, split.

    Attributes:
        train: the records that the guarantee protects, each an example of its own.
        validation: records treated as PUBLIC: metrics computed on them are reported without noise
            and without charge, unless a tune space says that they are private.
        dataset_id: fingerprint of `train`; the ledger of one dataset refuses another.
        public: whether `train` holds nobody's secrets (a demonstration set), so that each run may
            keep a ledger of its own.
        columns: fingerprints of the single columns that `train` was made from, where there is more
            to it than `train` itself, so that a table with some of the columns is not taken for
            another dataset.
        units: whose the records of `train` are, where the guarantee is for units of several records
            (`privacy.unit`); None where each record is a unit.
        validation_public: whether metrics of `validation` may be told without noise.
        validation_source: fingerprints of what `validation` was taken from, by which others of its
            records are recognised.
        facts: what the task learned of the whole training set, such as the names of its labels.
    """

    train: Records
    validation: Records
    dataset_id: str
    public: bool = False
    columns: tuple[str, ...] = ()
    units: Units | None = None
    validation_public: bool = True
    validation_source: tuple[str, ...] = ()
    facts: Json = field(default_factory=Json)

    @property
    def unit_count(self) -> int:
        """The number of privacy units that training samples from."""
        return len(self.train if self.units is None else self.units)

    @cached_property
    def identity(self) -> tuple[str, ...]:
        """All fingerprints by which the training records, or columns of them, are recognised; every
        record is hashed for them, once.
        """
        return (self.dataset_id, *self.columns, *column_fingerprints(self.train))

    @cached_property
    def validation_identity(self) -> tuple[str, ...]:
        """The same of the validation records, their own fingerprint first."""
        columns = column_fingerprints(self.validation)
        return (fingerprint_records(self.validation), *columns, *self.validation_source)


_Task = TypeVar("_Task")

_PARTS = {
    "train": Records,
    "validation": Records,
    "dataset_id": str,
    "public": bool,
    "columns": tuple,
    "units": (Units, type(None)),
}


@runtime_checkable
class Task(Protocol):
    """A model and its data. Make it a frozen dataclass of plain values, importable wherever workers
    run.

    Every process of a run calls these methods anew, so each must give the same answer everywhere;
    nothing is sent between processes.

    A class may have an attribute `bounded_metrics`, a tuple of the names of those metrics that are
    means over the records of a value that lies in [0, 1] with certainty, as whether the answer is
    right does and a loss does not; without it there are none. Only these can be the score of a
    sweep whose validation records are private.

    A class may have an attribute `views`, the number K of rows that `collate` gives a record, such
    as augmented views of an image, one record's after the other's; without it K is 1. A record's
    gradient is the average of its views'.
    """

    @property
    def name(self) -> str:
        """A short name for files and reports: letters, digits, dots, dashes, underscores."""
        ...

    def load(self) -> Data:
        """Read and check the whole dataset. Raises DataError before any work for anything that
        cannot be used.

        A task that knows columns takes `load(unit="column")`, too, which names the privacy unit of
        a record, and gives `Data.units` then; without it there are none.
        """
        ...

    def build_model(self, seed: int) -> nn.Module:
        """The model at step 0, a function of the public seed alone; in eval mode unless dropout is
        wanted.
        """
        ...

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        """The batch of the records at `indices`: tensors with B = len(indices) in dimension 0, or
        `views` times as many.
        """
        ...

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Losses (B,), each a function of its own example alone: the unit that the guarantee
        protects.
        """
        ...

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Metrics of the model on records, such as {"accuracy": 0.9, "loss": 0.3}."""
        ...

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a folder that Hugging Face's AutoModel....from_pretrained loads."""
        ...


def loaded(task: Task, unit: str = "") -> Data:
    """What a task loads, if it is a dataset.

    Args:
        unit: `privacy.unit`, the column that names each record's privacy unit; empty where the unit
            is one record.

    Raises:
        TaskFailed: see `redaction.run_redacted`. ConfigError: it is something else, or its units
            are not those that were asked for.
    """
    data = run_redacted(partial(load, task, unit), public=False)
    parts = [("task.load returns", data, Data)]
    if isinstance(data, Data):
        parts = [
            (f"task.load's {name}", getattr(data, name), kind) for name, kind in _PARTS.items()
        ]
    for what, part, kind in parts:
        if not isinstance(part, kind):
            fix = (
                "return grape_ray.tasks.task.Data(train, validation, dataset_id), as"
                " pipelines/digits_vit.py does"
            )
            named = kind if isinstance(kind, type) else kind[0]
            raise ConfigError(
                what, type(part).__name__, f"{named.__module__}.{named.__name__}", fix
            )
    _check_units(data, unit)
    return data


def resolved(task: _Task, data: Data) -> _Task:
    """The task with what it read from its data written into its fields, where it has a method
    `resolved` for that: so that its model can be built where the data is not.
    """
    resolve = getattr(task, "resolved", None)
    return task if resolve is None else run_redacted(lambda: resolve(data), data.public)


def load(task: Task, unit: str = "") -> Data:
    """What a task loads, with the units that a column names.

    Raises:
        ConfigError: a unit is asked for, and the task's `load` takes none.
    """
    if not unit:
        return task.load()
    if "unit" not in inspect.signature(task.load).parameters:
        raise ConfigError(
            "privacy.unit",
            unit,
            f"nothing, because {type(task).__name__}.load takes no unit",
            "let it take load(unit='') and give Data.units, or unset privacy.unit",
        )
    return task.load(unit=unit)  # pyright: ignore[reportCallIssue]


def _check_units(data: Data, unit: str) -> None:
    """Refuses units that were not asked for, none where they were, and those of other records."""
    if (data.units is None) != (not unit):
        got = "no units" if data.units is None else "units"
        expected = f"those of column {unit!r}" if unit else "none, because privacy.unit is not set"
        raise ConfigError("task.load gives", got, expected, "correct task.load, or privacy.unit")
    if data.units is not None and len(data.units.order) != len(data.train):
        raise ConfigError(
            "task.load's units",
            f"of {len(data.units.order)} records",
            f"of the {len(data.train)} training records",
            "make them from the column of those very rows",
        )


def views_of(task: Task) -> int:
    """Rows that a task's `collate` gives a record. Raises ConfigError for no positive integer."""
    views = getattr(task, "views", 1)
    if not isinstance(views, int) or isinstance(views, bool) or views < 1:
        raise ConfigError("task.views", views, "an integer >= 1", "say how many rows a record has")
    return views


def label(task: Any) -> str:
    """What a user would call the records of a task: its name, and the table that it trains on where
    a field `data` says it.
    """
    table = getattr(task, "data", None)
    if not isinstance(table, str) or not table:
        return str(task.name)
    return f"{task.name} ({Path(table).absolute() if Path(table).exists() else table})"


def classification_metrics(
    task: Task, model: nn.Module, records: Records, batch_size: int = 64
) -> dict[str, float]:
    """Accuracy and mean cross-entropy of a Hugging Face classifier whose batches carry `labels`
    (B,).
    """
    correct, loss = 0, 0.0
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for start in range(0, len(records), batch_size):
            batch = to_device(
                task.collate(records, np.arange(start, min(start + batch_size, len(records)))),
                device,
            )
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
            correct += int((logits.argmax(-1) == batch["labels"]).sum())
            loss += float(nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
    return {"accuracy": correct / len(records), "loss": loss / len(records)}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for the time of a block, then each module in its own mode again: a
    frozen layer may have had another.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def classification_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy (B,) of a Hugging Face classifier on a batch with `labels` (B,)."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def loss_of(task: Task, precision: str, device: str) -> PerExampleLoss:
    """The task's per-example loss in a precision that `config.schema.Performance` names."""
    return (
        under_autocast(task.per_example_loss, device)
        if precision == "bf16"
        else task.per_example_loss
    )


def under_autocast(loss: PerExampleLoss, device: str) -> PerExampleLoss:
    """The loss with products and activations in bfloat16, itself in fp32."""

    def under(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return loss(model, batch).float()

    return under
