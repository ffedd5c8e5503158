"""A prepared set: a dataset's records as a task reads them, split and encoded once, and mapped by
whoever trains on them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from grape_ray.data.arrays import Records
from grape_ray.data.columns import Table
from grape_ray.data.content import fingerprint, fingerprint_columns
from grape_ray.data.fingerprints import row_hashes
from grape_ray.data.record_files import RecordsWriter, read_records
from grape_ray.data.sources import Source
from grape_ray.data.tables import read_table
from grape_ray.data.units import Units
from grape_ray.errors import DataError
from grape_ray.storage import Json

INDEX, TRAIN, VALIDATION = "index.json", "train.arrow", "validation.arrow"
UNITS = ("unit_offsets.npy", "unit_records.npy")
_ROWS, _BYTES = 4096, 1 << 26  # encoded at a time, at most


@dataclass(frozen=True)
class Columns:
    """What a task reads of a table.

    Attributes:
        named: all columns, each of which must hold a value in every row. texts: of them, those of
            texts. filled: of them, those of texts or lists that must not be empty.
        labels: of them, those of labels, in which the integer -1 stands for none.
        computed: of the records that are made of it, the columns that a model has computed: their
            last bits may be others on another machine, so no split is made by them.
    """

    named: tuple[str, ...]
    texts: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()


class Encoder(Protocol):
    """How a task reads a table."""

    @property
    def columns(self) -> Columns: ...

    def facts(self, train: Table, names: Callable[[str], Sequence[str]]) -> Json:
        """What must be known of the whole training table, such as the labels' names; `names` gives
        those that the dataset itself says of a column.
        """
        ...

    def check(self, table: Table, facts: Json) -> None:
        """Refuses a split that cannot be encoded, quickly. Raises DataError."""
        ...

    def encode(self, table: Table, facts: Json) -> Records:
        """Some rows as records."""
        ...


@dataclass(frozen=True)
class Split:
    """How a dataset is divided.

    Attributes:
        train: the records that the guarantee protects. validation: others; None where a fraction of
            the first is held out.
        held_out: this fraction, by unit where there is one, else by record: which ones is a
            function of each one's content alone, so that one record more or less moves no other.
        unit: the column that names the privacy unit; empty where a record is one.
        limit, validation_limit: keep the first so many rows; 0 keeps all.
        drop_bad_rows: leave rows out that lack a value or a label, instead of refusing them.
    """

    train: Source
    validation: Source | None
    held_out: float = 0.0
    unit: str = ""
    limit: int = 0
    validation_limit: int = 0
    drop_bad_rows: bool = False


@dataclass(frozen=True)
class PreparedSet:
    """What a prepared set holds, mapped.

    Attributes:
        dataset_id, columns: fingerprints of the whole training table, held-out rows and what the
            limit or `drop_bad_rows` leaves out included, and of its columns.
        facts: see `Encoder.facts`.
        units: of the training records; None where each is one.
        validation_source: fingerprints of what the validation records were taken from: their table,
            whatever the limit, or the training table, whatever fraction of it is held out.
    """

    train: Records
    validation: Records
    dataset_id: str
    columns: tuple[str, ...]
    facts: Json = field(default_factory=Json)
    units: Units | None = None
    validation_source: tuple[str, ...] = ()


def open_prepared(folder: Path) -> PreparedSet:
    """The prepared set in a folder, mapped: opening it takes milliseconds, whatever its size."""
    index = json.loads((folder / INDEX).read_text())
    units = None
    if index["unit"]:
        offsets, order = (np.load(folder / name, mmap_mode="r") for name in UNITS)
        units = Units(offsets, order)
    return PreparedSet(
        read_records(folder / TRAIN),
        read_records(folder / VALIDATION),
        index["dataset_id"],
        tuple(index["columns"]),
        index["facts"],
        units,
        tuple(index["validation_source"]),
    )


def prepare(split: Split, encoder: Encoder, folder: Path) -> None:
    """Writes the prepared set of a dataset into a folder that is there.

    Raises:
        DataError: of its rows or columns; everything is checked before anything is encoded.
    """
    scratch = Path(tempfile.mkdtemp(prefix="tables-", dir=folder))
    try:
        _prepare(split, encoder, folder, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _prepare(split: Split, encoder: Encoder, folder: Path, scratch: Path) -> None:
    tables = checked_tables(split, encoder, scratch)
    writers = {name: RecordsWriter(folder / name) for name in (TRAIN, VALIDATION)}
    marks = encode_train(split, encoder, tables, writers)
    encode_validation(encoder, tables, writers[VALIDATION])
    for name, writer in writers.items():
        writer.finish()
        check_not_empty(name, (folder / name).exists())
    if split.unit:
        units = Units.of(np.unique(marks, return_inverse=True)[1])
        for name, array in zip(UNITS, (units.offsets, units.order)):
            np.save(folder / name, array)
    (folder / INDEX).write_text(json.dumps(tables.index))


@dataclass(frozen=True)
class CheckedTables:
    """A dataset's tables, of which every row can be used.

    Attributes:
        train, validation: the latter None where records are held out of the former. index: what an
            index holds: the dataset's fingerprints, the unit, what the task found out.
    """

    train: Table
    validation: Table | None
    index: Json

    @property
    def facts(self) -> Json:
        """See `Encoder.facts`."""
        return self.index["facts"]


def checked_tables(split: Split, encoder: Encoder, scratch: Path) -> CheckedTables:
    """The tables of a dataset, mapped from `scratch`. Raises DataError."""
    found = _table_of(split, split.train, encoder.columns, scratch)
    # with the rows that are left out: that some are, for a missing unit, makes no other dataset
    identity = found.rows.select(dict.fromkeys(encoder.columns.named))
    train = _usable(split, found, encoder.columns)
    index: Json = {
        "dataset_id": fingerprint(identity),
        "columns": fingerprint_columns(identity),
        "unit": split.unit,
    }
    index["validation_source"] = [f"held out of {index['dataset_id']}"]
    train = train.slice(0, split.limit or len(train))
    facts = index["facts"] = encoder.facts(train, split.train.label_names)
    encoder.check(train, facts)
    validation = None
    if split.validation is not None:
        found = _table_of(split, split.validation, encoder.columns, scratch, validation=True)
        identity = found.rows.select(dict.fromkeys(encoder.columns.named))
        index["validation_source"] = fingerprint_columns(identity)
        found = found.slice(0, split.validation_limit or len(found))
        validation = _usable(split, found, encoder.columns, validation=True)
        encoder.check(validation, facts)
    return CheckedTables(train, validation, index)


def encode_validation(encoder: Encoder, tables: CheckedTables, writer: RecordsWriter) -> None:
    """Writes the validation records, where they have a table of their own."""
    if tables.validation is not None:
        for part in _parts(tables.validation, "validation"):
            writer.append(encoder.encode(part, tables.facts))


def check_not_empty(name: str, there: bool) -> None:
    """Refuses a split without a record. Raises DataError."""
    if not there:
        fix = "give more records, or another task.held_out or task.validation"
        raise DataError(f"the {name.partition('.')[0]} split", "no record", "at least one", fix)


def _table_of(
    split: Split, source: Source, columns: Columns, scratch: Path, validation: bool = False
) -> Table:
    """A split's table, of the columns that are read."""
    wanted = list(dict.fromkeys([*columns.named, *_unit(split, validation)]))
    return Table(read_table(source, wanted, scratch, columns.texts), source.place)


def _usable(split: Split, table: Table, columns: Columns, validation: bool = False) -> Table:
    """A table without rows that cannot be used, which are refused unless they are to be dropped."""
    unit = _unit(split, validation)
    bad = table.bad_rows(table.rows.column_names, [*columns.filled, *unit], columns.labels)
    if not split.drop_bad_rows:
        table.refuse(bad)
    kept = table.without(np.logical_or.reduce(list(bad.values()))) if bad else table
    kept.check_texts(columns.texts)
    if not len(kept):
        got, fix = f"{len(table)} rows that cannot be used", "look at its columns"
        raise DataError(f"data of {table.place}", got, "at least one record", fix)
    return kept


def _unit(split: Split, validation: bool) -> list[str]:
    """The column that names units, where a table must have it."""
    return [split.unit] if split.unit and not validation else []


def encode_train(
    split: Split, encoder: Encoder, tables: CheckedTables, writers: Mapping[str, RecordsWriter]
) -> np.ndarray:
    """Writes the training records, and those held out of them; returns a number (N,) for each of
    the former, the hash of its unit, which says nothing where `split` has no unit.
    """
    marks = [np.empty(0, dtype=np.uint64)]
    for part in _parts(tables.train, "train"):
        records = encoder.encode(part, tables.facts)
        own = np.zeros(len(records), dtype=np.uint64)
        if split.unit:
            own = unit_hashes(part.rows[split.unit])
        elif split.held_out:  # hashing every row takes longer than reading it
            own = row_hashes(_read(records, encoder.columns.computed))
        held = _uniform(own) < split.held_out if split.held_out else np.zeros(len(own), bool)
        if held.any():
            writers[VALIDATION].append(records.take(np.flatnonzero(held)))
            records, own = records.take(np.flatnonzero(~held)), own[~held]
        if len(records):
            writers[TRAIN].append(records)
            marks.append(own)
    return np.concatenate(marks)


def _parts(table: Table, name: str) -> Iterator[Table]:
    """The rows of a table, a few at a time, with a progress bar on a terminal."""
    from tqdm import tqdm

    rows = max(1, min(_ROWS, _BYTES * len(table) // max(1, table.rows.nbytes)))
    starts = range(0, len(table), rows)
    quiet = len(starts) < 4 or not sys.stderr.isatty()
    for start in tqdm(starts, f"encoding {name}", unit_scale=rows, unit=" rows", disable=quiet):
        yield table.slice(start, rows)


def _read(records: Records, computed: tuple[str, ...]) -> Records:
    """The records without the columns that a model has computed."""
    return Records({n: column for n, column in records.columns.items() if n not in computed})


def unit_hashes(values: pa.ChunkedArray) -> np.ndarray:
    """(N,) uint64, a hash of each unit's name. Two units with one hash, of which there is a chance
    of 1e-8 among a million, are protected as one.
    """
    return np.fromiter(
        (_hash(str(value).encode(errors="surrogatepass")) for value in values.to_pylist()),
        dtype=np.uint64,
        count=len(values),
    )


def _uniform(marks: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each hash: of records alike the same."""
    mixed = np.fromiter((_hash(b"held out" + m.tobytes()) for m in marks), np.uint64, len(marks))
    return mixed / 2.0**64


def _hash(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
