"""A task from a model, a map-style dataset and a loss of the user's own, as `grape_ray.fit` takes
them.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from grape_ray.data.arrays import Records
from grape_ray.data.fingerprints import fingerprint_records
from grape_ray.errors import ConfigError, DataError
from grape_ray.tasks.batches import batches
from grape_ray.tasks.task import Data

_HERE = "this process:"  # before the number of an object that no other process can import
_objects: dict[str, object] = {}
_numbers = itertools.count()


def named(thing: object, importable: bool) -> str:
    """A text that stands for an object in a task's field: `module:name` of a function or class that
    can be imported, or a mark that this process alone understands.

    Args:
        importable: whether other processes must understand it.

    Raises:
        ConfigError: they must, and it is no function or class of a module.
    """
    module, name = getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")
    if callable(thing) and name and module != "__main__" and "<" not in name:
        return f"{module}:{name}"
    if importable:
        raise ConfigError(
            "an argument of fit with workers",
            name or type(thing).__name__,
            "a function of a module, which makes the object in each worker",
            "write `def make(): ...` into a file beside this one and pass that function",
        )
    mark = f"{_HERE}{next(_numbers)}"
    _objects[mark] = thing
    return mark


def thing(name: str) -> Any:
    """The object that a text of `named` stands for. Raises ConfigError in another process."""
    if name.startswith(_HERE):
        if name not in _objects:
            fix = "pass functions of a module to fit, so that a run can be resumed anywhere"
            raise ConfigError("an object of another process", name, "one that can be imported", fix)
        return _objects[name]
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


@dataclass(frozen=True)
class FunctionTask:
    """Each item of a dataset is one example: a tensor, or a tuple or dict of tensors, all items of
    the same shapes.

    Attributes:
        model: stands (see `named`) for an nn.Module, or a function that makes one, always the
            same. data, validation: for map-style datasets (`len`, `[]`), or functions that make
            one; no validation is evaluated where there is none. loss: for a function
            (model, batch) -> (B,), where a batch is like an item, with B in dimension 0.
        public: whether `data` holds nobody's secrets.
    """

    model: str
    data: str
    loss: str
    validation: str = ""
    public: bool = False
    name: str = "fit"

    @staticmethod
    def imported(fields: Mapping[str, object]) -> list[str]:
        """The modules of the functions that fields name, which whoever is handed a description must
        trust: they are imported and called.
        """
        named = (str(fields.get(key, "")) for key in ("model", "data", "loss", "validation"))
        return [name.partition(":")[0] for name in named if name and not name.startswith(_HERE)]

    def load(self) -> Data:
        train = _records(_made(self.data), "data")
        held = _records(_made(self.validation), "validation") if self.validation else None
        empty = np.empty(0, dtype=np.int64)
        return Data(
            train=train,
            validation=train.take(empty) if held is None else held,
            dataset_id=fingerprint_records(train),
            public=self.public,
            validation_public=held is not None,
        )

    def build_model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            made = thing(self.model)
            model = copy.deepcopy(made) if isinstance(made, nn.Module) else made()
        if not isinstance(model, nn.Module):
            fix = "return the module"
            raise ConfigError("fit's model", type(model).__name__, "a torch.nn.Module", fix)
        return model

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        return {name: torch.from_numpy(records.array(name)[indices]) for name in records.columns}

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return thing(self.loss)(model, _item(batch))

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """The mean loss."""
        total = sum(
            float(self.per_example_loss(model, batch).double().sum())
            for _, batch in batches(self, model, records)
        )
        return {"loss": total / len(records)}

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes `model.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_model(model, str(folder / "model.safetensors"))


def _made(name: str) -> Any:
    """A dataset, or what a function makes of one."""
    found = thing(name)
    return found if hasattr(found, "__getitem__") and not isinstance(found, type) else found()


def _records(dataset: Any, name: str) -> Records:
    """The items of a dataset as columns: of a tuple `0`, `1` and so on, of a lone tensor `item`."""
    columns: dict[str, list[np.ndarray]] = {}
    for place in range(len(dataset)):
        for key, value in _parts(dataset[place]).items():
            columns.setdefault(key, []).append(np.asarray(value))
    if not columns:
        raise DataError(f"fit's {name} is empty", 0, "at least one item", "check the dataset")
    for key, values in columns.items():
        shapes = {value.shape for value in values}
        if len(shapes) > 1 or len(values) != len(dataset):
            got = f"{len(shapes)} shapes in {len(values)} of {len(dataset)} items"
            fix = "pad them, or write a task (grape_ray.tasks.task.Task) that pads each batch"
            raise DataError(f"part {key!r} of fit's {name}", got, "one shape in every item", fix)
    return Records({key: np.stack(values) for key, values in columns.items()})


def _parts(item: object) -> dict[str, object]:
    if isinstance(item, Mapping):
        return {f"key {key}": value for key, value in item.items()}
    if isinstance(item, (tuple, list)):
        return {str(place): value for place, value in enumerate(item)}
    return {"item": item}


def _item(batch: Mapping[str, Tensor]) -> object:
    """A batch in the form that the dataset's items have."""
    if set(batch) == {"item"}:
        return batch["item"]
    if all(name.startswith("key ") for name in batch):
        return {name.removeprefix("key "): value for name, value in batch.items()}
    return tuple(batch[str(place)] for place in range(len(batch)))
