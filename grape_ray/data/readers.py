"""Readers of single files, a few thousand records at a time: CSV, JSON Lines, Parquet, Arrow, plain
text.

An error of the reader behind them may quote a record, so only what is known to hold none is passed
on: the number of a row, the name of a type.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from grape_ray.errors import DataError, nearest

_BLOCK_BYTES = 1 << 24  # of a text file, parsed at a time
_LINES = 65536
ENDINGS = {
    ".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "json",
    ".ndjson": "json", ".json": "json", ".arrow": "arrow", ".feather": "arrow", ".txt": "text",
}  # fmt: skip
_NAMES = {
    "parquet": "Parquet",
    "csv": "CSV",
    "tsv": "CSV",
    "json": "JSON Lines",
    "arrow": "Arrow",
    "text": "text",
}
FORMATS = tuple(_NAMES)
_NAME = re.compile(r"[A-Za-z_][\w.\-/]{0,39}")  # what is quoted as the name of a column
Batches = Iterator[pa.RecordBatch]
Choose = Callable[[pa.Schema], Sequence[str]]


def format_of(path: str, chosen: str = "") -> str:
    """The format of a file by the end of its name, where none is chosen; Parquet where that says
    nothing.

    Raises:
        DataError: an unknown format was chosen.
    """
    if chosen and chosen not in FORMATS:
        raise DataError(
            "task.data_format", chosen, "one of " + ", ".join(FORMATS), nearest(chosen, FORMATS)
        )
    return chosen or named_format(path) or "parquet"


def named_format(path: str) -> str:
    """The format that the end of a file's name says, compressed or not; empty for none."""
    name = re.sub(r"[?#].*", "", path).lower()  # of an address without its signature
    name = re.sub(r"\.(gz|bz2|zst|xz)$", "", name)
    return next((known for end, known in ENDINGS.items() if name.endswith(end)), "")


def batches_of(
    fs: Any, path: str, kind: str, columns: Sequence[str] | None, texts: Sequence[str] = ()
) -> Batches:
    """A file, batch by batch.

    Args:
        columns: those that are wanted; None is all. texts: of them, those that hold texts whatever
            they look like, in a format that has no types of its own.

    Raises:
        DataError: it cannot be read, or a column is missing or there twice.
    """

    def choose(schema: pa.Schema) -> Sequence[str]:
        check_columns(path, schema.names, schema.names if columns is None else columns)
        return schema.names if columns is None else columns

    try:
        with contextlib.ExitStack() as held:
            # Arrow opens a local file itself, and no thread is used on another: a thread of Arrow's
            # that still holds a file of Python's when the interpreter ends, as it does where the
            # table is refused at once, aborts the process.
            if isinstance(fs, LocalFileSystem) and kind == "parquet":
                source = path
            else:
                source = held.enter_context(fs.open(path, "rb", compression="infer"))
            yield from _READERS[kind](source, choose, texts)
    except (pa.ArrowException, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        expected = f"an intact {_NAMES[kind]} file"
        what, reason = f"data cannot be read as {_NAMES[kind]}", _reason(error, kind)
        failure = DataError(what, path, expected, reason)
    else:
        return
    raise failure  # not in the handler, where Python would hang the original on it


def check_columns(place: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuses columns that are missing, or there twice. Raises DataError."""
    for column in wanted:
        if column not in names:
            fix = _nearest_column(column, names) if names else "name another file"
            raise DataError(f"column missing in {place}", column, "a column of the file", fix)
        count = list(names).count(column)
        if count > 1:
            got, fix = f"{count} columns of that name", "rename all but one"
            raise DataError(f"column '{column}' of {place}", got, "one", fix)


def are_names(columns: Sequence[str]) -> bool:
    """Whether what a file calls its columns may be said; where one is no name, it is the first
    record's, of a file without a header.
    """
    return all(map(_NAME.fullmatch, columns))


def _nearest_column(column: str, names: Sequence[str]) -> str:
    """A hint with the columns' names, where they may be said."""
    if are_names(names):
        return nearest(column, names)
    return "look at the file's header: names with spaces or beginning with a digit are not quoted"


class _Unreadable(pa.ArrowInvalid):
    """A reason of our own, which quotes no record."""


def _reason(error: Exception, kind: str) -> str:
    """What may be said of a reader's error."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, _Unreadable):
        return text
    if kind in ("parquet", "arrow"):  # binary: their errors speak of structure
        return f"the reader says: {text[:200]}"
    if isinstance(error, UnicodeDecodeError) or "UTF8" in text:
        return "save it in UTF-8"
    if "empty" in text.lower():
        return "it is empty"
    row = re.search(r"(?:row|line) #?(\d+)", text, re.IGNORECASE)
    if row is None:
        return "set task.data_format if it has another format"
    header = 2 if kind in ("csv", "tsv") else 0  # the reader counts from 1, and the header, too
    return f"look at row {int(row[1]) - header}, counted from 0"


def _parquet(source: Any, choose: Choose, texts: Sequence[str]) -> Batches:
    with pq.ParquetFile(source, pre_buffer=False) as file:
        columns = list(choose(file.schema_arrow))
        yield pa.RecordBatch.from_pylist([], schema=_selected(file.schema_arrow, columns))
        yield from file.iter_batches(columns=columns, use_threads=isinstance(source, str))


def _csv(source: Any, choose: Choose, texts: Sequence[str], delimiter: str = ",") -> Batches:
    bad: list[str] = []

    def refuse(row: Any) -> str:
        place = "a row" if row.number is None else f"row {row.number - 2}"  # below the header
        bad.append(f"{place} has {row.actual_columns} fields, the header {row.expected_columns}")
        return "error"

    try:
        reader = pyarrow.csv.open_csv(
            source,
            pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            pyarrow.csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse
            ),
            pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
        )
        columns = choose(reader.schema)
        for batch in reader:
            yield batch.select(columns)
    except pa.ArrowInvalid:
        if bad:
            raise _Unreadable(f"{bad[0]}: put commas and line ends in double quotes") from None
        raise


def _json(source: Any, choose: Choose, texts: Sequence[str]) -> Batches:
    first = source.read(1)
    while first.isspace():
        first = source.read(1)
    source.seek(0)
    if first == b"[":  # one array: it is parsed whole
        rows = json.load(source)
        if not all(isinstance(row, dict) for row in rows):
            raise _Unreadable("it is an array of other things than objects")
        found = pa.Table.from_pylist(rows)
        yield from found.select(choose(found.schema)).to_batches()
        return
    reader = pyarrow.json.open_json(
        source, pyarrow.json.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES)
    )
    columns = choose(reader.schema)
    for batch in reader:
        yield batch.select(columns)


def _arrow(source: Any, choose: Choose, texts: Sequence[str]) -> Batches:
    magic = source.read(6)
    source.seek(0)
    if magic == b"ARROW1":
        with pa.ipc.open_file(source) as file:
            columns = choose(file.schema)
            yield from (file.get_batch(i).select(columns) for i in range(file.num_record_batches))
        return
    with pa.ipc.open_stream(source) as stream:  # as Hugging Face `datasets` writes them
        columns = choose(stream.schema)
        yield from (batch.select(columns) for batch in stream)


def _text(source: Any, choose: Choose, texts: Sequence[str]) -> Batches:
    schema = pa.schema([("text", pa.string())])
    choose(schema)
    lines: list[str] = []
    for line in source:
        lines.append(line.decode().rstrip("\r\n"))
        if len(lines) == _LINES:
            yield pa.record_batch([pa.array(lines, pa.string())], schema=schema)
            lines = []
    yield pa.record_batch([pa.array(lines, pa.string())], schema=schema)


def _selected(schema: pa.Schema, columns: Sequence[str]) -> pa.Schema:
    return pa.schema([schema.field(column) for column in columns])


_READERS: dict[str, Callable[..., Batches]] = {
    "parquet": _parquet,
    "csv": _csv,
    "tsv": partial(_csv, delimiter="\t"),
    "json": _json,
    "arrow": _arrow,
    "text": _text,
}
