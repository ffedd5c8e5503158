"""What the tasks on a dataset have in common: where the model and the records are, and how they are
read, split and kept.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import Tensor, nn

from grape_ray.config.modules import code_of
from grape_ray.data.arrays import Records
from grape_ray.data.cache import cached
from grape_ray.data.columns import Table
from grape_ray.data.prepared import Columns, PreparedSet, Split, prepare
from grape_ray.data.shards import is_sharded_set, open_sharded_set
from grape_ray.data.sources import Source
from grape_ray.errors import Caution, ConfigError
from grape_ray.models import four_bit
from grape_ray.models.adapters import Lora, adapted, is_adapted, merged, save_adapters
from grape_ray.models.hugging_face import WEIGHTS, load_tokenizer, save_pretrained
from grape_ray.storage import Json
from grape_ray.tasks.task import Data

_Task = TypeVar("_Task", bound="DatasetTask")
# Fields that say where things are or how the model learns, not what a prepared set holds.
_NOT_ENCODED = {
    "name", "public", "model", "data", "validation", "held_out_public", "data_config", "split",
    "data_format", "lora", "trainable", "weights", "dropout", "pooling", "loss", "max_new_tokens",
    "evaluate_generations", "views", "crop_padding", "flip",
}  # fmt: skip


@dataclass(frozen=True)
class DatasetTask:
    """One row of a dataset is one example.

    Attributes:
        model: hub name or folder of a pretrained model; public, like its tokenizer: not made from
            the training data. Or `scratch:FAMILY`, such as `scratch:vit?hidden_size=192`: random
            weights (`models.from_scratch`).
        data: the training records: a file (CSV, JSON Lines, Parquet, Arrow, plain text), a folder
            or pattern with some, a URL (`hf://datasets/...`, `s3://...`), a folder of images or one
            that `datasets` saved, or a dataset's name on the hub.
        validation: other records, in the same way, or the name of a split of `data`; PUBLIC unless
            a sweep says otherwise.
        held_out: in place of `validation`, this fraction of `data`, by unit where there is one.
        held_out_public: whether what is held out may be spoken of without noise; otherwise no
            metric of it is told.
        data_config, split: configuration and split of a dataset on the hub. data_format: of files
            whose names do not say it: parquet, csv, tsv, json, arrow or text.
        limit, validation_limit: keep the first so many rows; 0 keeps all.
        drop_bad_rows: leave rows out that lack a value, or whose declared label is -1, as datasets
            on the hub mark those without one, instead of refusing them.
        public: whether the training data holds nobody's secrets (a public benchmark), so that each
            run may have a ledger of its own.
        lora: adapters that are trained in place of the model's own weights.
        trainable: name patterns (fnmatch) of the weights that are trained, such as `classifier.*`
            or `*bias`, and `upper-half`, the later half of the layers; none trains all, or the
            adapters alone.
        weights: `fp32`, `bf16` or `nf4`: of the weights in memory; adapters are fp32 in any. `nf4`
            has four bits a weight of a linear layer, through bitsandbytes, beside adapters alone.
    """

    renamed: ClassVar[Mapping[str, str]] = {"train": "data"}  # fields by their former names

    model: str
    data: str
    validation: str = ""
    held_out: float = 0.0
    held_out_public: bool = False
    data_config: str = ""
    split: str = "train"
    data_format: str = ""
    limit: int = 0
    validation_limit: int = 0
    drop_bad_rows: bool = False
    public: bool = False
    lora: Lora = Lora()  # noqa: RUF009  (frozen)
    trainable: tuple[str, ...] = ()
    weights: str = "fp32"

    def __post_init__(self) -> None:
        self.check_fields()

    @property
    def columns(self) -> Columns:
        """The columns that are read."""
        raise NotImplementedError

    def facts(self, train: Table, names: Callable[[str], Sequence[str]]) -> Json:
        """See `prepared.Encoder`; a task without any keeps this."""
        return {}

    def check(self, table: Table, facts: Json) -> None:
        """See `prepared.Encoder`; a task whose encoding refuses nothing keeps this."""

    def encode(self, table: Table, facts: Json) -> Records:
        """See `prepared.Encoder`."""
        raise NotImplementedError

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        """See `tasks.task.Task`."""
        raise NotImplementedError

    def reader(self) -> str:
        """What turns a row into numbers, as its fingerprint: the tokenizer or image processor."""
        raise NotImplementedError

    def load(self, unit: str = "") -> Data:
        """The dataset, prepared on this machine unless it is already.

        Args:
            unit: the column that names the privacy unit; empty is a record.

        Raises:
            DataError: rows or columns that cannot be used. ConfigError: no validation records.
        """
        self.check_together()
        found = self.prepared(unit)
        return Data(
            train=found.train,
            validation=found.validation,
            dataset_id=found.dataset_id,
            public=self.public,
            columns=found.columns,
            units=found.units,
            facts=found.facts,
            validation_public=not self.held_out or self.held_out_public or self.public,
            validation_source=found.validation_source,
        )

    def prepared(self, unit: str = "") -> PreparedSet:
        """The prepared set; see `load`."""
        if is_sharded_set(self.data):
            return open_sharded_set(self.data, self.encoding(unit))
        split = self.division(unit)
        identity = {
            # first, because a file that is not there is found out at once
            "train": split.train.identity(),
            "validation": split.validation.identity() if split.validation else None,
            **self.encoding(unit),
        }
        return cached(identity, partial(prepare, split, self))

    def encoding(self, unit: str) -> Json:
        """What decides how a row is encoded, and what becomes of it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        encoded = {k: v for k, v in fields.items() if k not in _NOT_ENCODED}
        return {
            "task": f"{type(self).__module__}:{type(self).__qualname__}",
            "code": code_of(type(self)),
            "fields": json.loads(json.dumps(encoded)),
            "unit": unit,
            "reader": self.reader(),
        }

    def division(self, unit: str) -> Split:
        """Where the records come from, and how they are split."""
        train = Source(self.data, self.data_config, self.split, self.data_format)
        validation = None if self.held_out else train.other(self._validation_place())
        return Split(
            train,
            validation,
            self.held_out,
            unit,
            self.limit,
            self.validation_limit,
            self.drop_bad_rows,
        )

    def resolved(self: _Task, data: Data) -> _Task:
        """The task with what is read from the data written into its fields, so that the model can
        be built where the data is not.
        """
        return self

    def check_fields(self) -> None:
        """Refuses a field that no run could have. Raises ConfigError."""
        if not 0 <= self.held_out < 1:
            raise ConfigError("task.held_out", self.held_out, "a fraction from 0 to below 1")
        self.check_at_least(limit=0, validation_limit=0)
        if self.weights not in WEIGHTS:
            raise ConfigError("task.weights", self.weights, "one of " + ", ".join(WEIGHTS))

    def check_together(self) -> None:
        """Refuses fields that contradict each other; while they are set one by one, they may.
        Raises ConfigError.
        """
        if self.held_out and self.validation:
            fix = "unset one: --set task.validation= or --set task.held_out=0"
            got = f"{self.held_out} and {self.validation!r}"
            raise ConfigError("task.held_out and task.validation", got, "one of them", fix)
        if self.weights == "nf4":
            self._check_four_bit()

    def check_at_least(self, **lowest: int) -> None:
        """Raises ConfigError where a field is below the number given for it."""
        for field, low in lowest.items():
            if getattr(self, field) < low:
                raise ConfigError(
                    f"task.{field}",
                    getattr(self, field),
                    f"an integer >= {low}",
                    "set another value",
                )

    def prepared_model(self, model: nn.Module, seed: int) -> nn.Module:
        """The model with the adapters that the fields ask for."""
        return adapted(model, self.lora, self.trainable, seed)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes a folder that Hugging Face's AutoModel....from_pretrained loads, or adapters that
        peft loads.
        """
        if not is_adapted(model):
            save_pretrained(model, folder)
        elif self.lora.merge:
            save_pretrained(merged(copy.deepcopy(model)), folder)
        else:
            save_adapters(model, folder)

    def _check_four_bit(self) -> None:
        """Refuses what cannot be with weights that nothing can be added to. Raises ConfigError."""
        four_bit.check_available()
        if not self.lora.rank:
            fix = "set task.lora.rank=8, or task.weights=bf16"
            raise ConfigError("task.weights=nf4", "no adapters", "task.lora.rank >= 1", fix)
        if self.lora.merge:
            fix = "set task.lora.merge=false: peft loads them beside the model as it was"
            expected = "an export of the adapters alone"
            raise ConfigError("task.lora.merge with task.weights=nf4", True, expected, fix)

    def _validation_place(self) -> str:
        if not self.validation:
            raise ConfigError(
                "no validation records",
                None,
                "task.validation, or a fraction that task.held_out takes from the training records",
                "set task.held_out=0.1, or name other records with task.validation",
            )
        return self.validation


@dataclass(frozen=True)
class TokenizedTask(DatasetTask):
    """A task whose model has a tokenizer; the other fields are those of DatasetTask.

    Attributes:
        max_tokens: longer texts are cut.
    """

    max_tokens: int = 128

    def check_fields(self) -> None:
        super().check_fields()
        self.check_at_least(max_tokens=1)

    def load_tokenizer(self) -> Any:
        """The tokenizer that reads the texts; None where bytes are read."""
        return tokenizer_of(self.model)

    def reader(self) -> str:
        return tokenizer_fingerprint(self.load_tokenizer())

    def pad_token(self) -> int:
        """The token that fills rows up."""
        tokenizer = self.load_tokenizer()
        found = tokenizer.pad_token_id
        return found if found is not None else (tokenizer.eos_token_id or 0)

    def save(self, model: nn.Module, folder: Path) -> None:
        super().save(model, folder)
        tokenizer = self.load_tokenizer()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class TextTask(TokenizedTask):
    """A task on a column of texts; the other fields are those of TokenizedTask.

    Attributes:
        text_column: name of the column of texts.
    """

    text_column: str = "text"


@lru_cache(maxsize=4)
def tokenizer_of(name: str, field: str = "task.model", **options: Any) -> Any:
    """The tokenizer of a hub name or folder; each is loaded once a process, which takes a second.

    Args:
        field: the task's field that names it, for errors. options: of the tokenizer.
    """
    return load_tokenizer(name, field, **options)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """What changes when a tokenizer reads a text differently."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Json = json.loads(backend.to_str()) if backend is not None else {}
    for state in ("truncation", "padding"):  # of the last call
        rules.pop(state, None)
    said = [
        type(tokenizer).__name__,
        json.dumps(rules, sort_keys=True),
        repr(sorted(tokenizer.special_tokens_map.items())),
        str(getattr(tokenizer, "chat_template", None)),
    ]
    return hashlib.sha256("|".join(said).encode()).hexdigest()[:32]


def warn_of_labels(task: DatasetTask, labels: Sequence[str]) -> None:
    """Says that the names of labels, which go into the model, were read from private records."""
    if not task.public:
        text = (
            f"the names of the {len(labels)} labels were read from the training records and are not"
            " protected by the guarantee; where they are not public, name them in task.labels"
        )
        warnings.warn(text, Caution, stacklevel=4)
