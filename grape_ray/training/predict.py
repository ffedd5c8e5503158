"""What a trained model answers for new records, written to a file."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from grape_ray.config.description import describe_task, read_run, rebuild_config, rebuild_task
from grape_ray.data.arrays import Records
from grape_ray.data.columns import Table
from grape_ray.data.sources import Source
from grape_ray.data.tables import read_table
from grape_ray.errors import ConfigError, StorageError
from grape_ray.models.adapters import Lora
from grape_ray.privacy.redaction import run_redacted
from grape_ray.storage import Json, Storage
from grape_ray.training.build import newest_checkpoint, trained_model

TASK_FILE = "grape_ray_task.json"  # beside an exported model
_ROWS = 1024
_ENDINGS = (".jsonl", ".parquet")


def describe_exported(task: object) -> str:
    """What an exported folder says of the task, as JSON: without where its records, its model and
    its tokenizer lie, of which the folder holds the latter two.
    """
    known = describe_task(task)
    hidden = ["model", "data", "validation", "data_config"]
    if known["fields"].get("tokenizer") != "bytes":
        hidden.append("tokenizer")
    fields = {k: "" if k in hidden else v for k, v in known["fields"].items()}
    return json.dumps({**known, "fields": fields}, indent=1) + "\n"


def predict(model: str, file: str, out: str | os.PathLike[str], trust: Iterable[str] = ()) -> int:
    """Writes the model's answers for the records of a file, one row each in their order; returns
    how many there are.

    Args:
        model: a run's folder or URL, or a folder that `export` wrote. file: records, as
            `task.data` takes them; they need no labels. out: a new file, .jsonl or .parquet.
        trust: modules that the description may have imported, beside this project's own.

    Raises:
        ConfigError: the task cannot predict, or `out` has another ending. DataError: the records
            cannot be used. StorageError: `out` is taken or cannot be written.
    """
    target = Path(out).expanduser().absolute()
    if target.suffix not in _ENDINGS:
        raise ConfigError("--out", str(out), "a name that ends in " + " or ".join(_ENDINGS))
    if target.exists():
        raise StorageError("the file to write is taken", str(target), "a new file", "name another")
    task, net = _task_and_model(model, trust)
    if not callable(getattr(type(task), "predict", None)):
        fix = "give its class predict(model, records), inputs(table) and input_columns"
        raise ConfigError("the task cannot predict", type(task).__name__, "one that can", fix)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".predict-", dir=target.parent) as scratch:
            part = Path(scratch, target.name)
            answers = _answers(task, net, file, Path(scratch))
            count = run_redacted(partial(_write, answers, part), task.public)
            os.replace(part, target)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        expected = "a file that you may write"
        raise StorageError("answers cannot be written", str(target), expected, reason) from error
    return count


def _task_and_model(place: str, trust: Iterable[str]) -> tuple[Any, nn.Module]:
    described = Path(place).expanduser().absolute() / TASK_FILE
    if not described.is_file():
        folder = Storage(place)
        config = rebuild_config(read_run(folder), trust)
        return config.task, trained_model(config, newest_checkpoint(folder))
    known: Json = json.loads(described.read_text())
    task = rebuild_task(known, trust)
    own: Json = {"model": str(described.parent)}
    if getattr(task, "lora", Lora()).rank:
        if not task.lora.merge:
            fix = "predict with the run's folder, or export it with task.lora.merge=true"
            raise ConfigError("the folder holds adapters alone", place, "a whole model", fix)
        own |= {"lora": Lora(), "trainable": ()}
    names = {field.name for field in dataclasses.fields(task)}
    if names >= {"tokenizer"} and task.tokenizer not in ("", "bytes"):
        own["tokenizer"] = ""  # the export holds it
    task = dataclasses.replace(task, **{k: v for k, v in own.items() if k in names})
    return task, task.build_model(0)


def _answers(task: Any, model: nn.Module, file: str, scratch: Path) -> Iterator[dict[str, list]]:
    columns = task.input_columns
    table = Table(read_table(Source(file), columns.named, scratch, columns.texts), file)
    table.refuse(table.bad_rows(columns.named, columns.filled))
    for start in range(0, len(table), _ROWS):
        part = table.slice(start, _ROWS)
        yield task.predict(model, Records(task.inputs(part)))


def _write(answers: Iterator[dict[str, list]], path: Path) -> int:
    """Writes answers in batches; memory does not grow with them."""
    count = 0
    writer: Any = None
    with path.open("wb") as file:
        for batch in answers:
            rows = pa.table(batch)
            count += rows.num_rows
            if path.suffix == ".jsonl":
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.to_pylist())
                file.write("".join(lines).encode())
                continue
            writer = writer or pq.ParquetWriter(file, rows.schema)
            writer.write_table(rows)
        if writer is not None:
            writer.close()
    return count
