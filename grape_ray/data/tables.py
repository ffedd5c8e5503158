"""Parquet tables over fsspec, checked column by column before any work begins."""

from __future__ import annotations

import contextlib
import hashlib
import math
import zlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from grape_ray.data.files import found_files
from grape_ray.errors import DataError, nearest

LOOKED_AT = 4096  # first rows of a column, by which it is judged how much it tells
_CHANCE_BITS, _ZLIB_BYTES = 64, 16  # the latter of every compressed text, however short


def read_table(url: str, columns: Sequence[str]) -> pa.Table:
    """The named columns of a Parquet file, of all Parquet files in a folder, or of those that a
    pattern with `*` matches.

    Args:
        url: a local path, `hf://datasets/<owner>/<name>/...`, `s3://...` or any other URL that
            fsspec knows.

    Raises:
        DataError: nothing there, not Parquet, a column missing or there twice, files of different
            columns, or no rows.
    """
    fs, files = found_files(url)
    tables = [_read_file(fs, file, columns) for file in files]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        types = sorted(
            {
                f"{column} {table.schema.field(column).type}"
                for table in tables
                for column in columns
            }
        )
        raise DataError(
            f"the files of {url} differ",
            ", ".join(types),
            "columns of one type",
            "convert them, or name one file",
        ) from error
    for place, column in enumerate(columns):  # as pandas keeps categories
        if pa.types.is_dictionary(table[column].type):
            table = table.set_column(
                place, column, table[column].cast(table[column].type.value_type)
            )
    if table.num_rows == 0:
        raise DataError("data has no rows", url, "at least one record", "check the path")
    return table


def _read_file(fs: Any, path: str, columns: Sequence[str]) -> pa.Table:
    """The named columns of one file.

    A local one is opened by Arrow itself, and no thread is used on another: a thread of Arrow's
    that still holds a file of Python's when the interpreter ends, as it does where the table is
    refused at once, aborts the process.
    """
    local = isinstance(fs, LocalFileSystem)
    try:
        with contextlib.ExitStack() as held:
            source = path if local else held.enter_context(fs.open(path, "rb"))
            file = held.enter_context(pq.ParquetFile(source, pre_buffer=False))
            names = file.schema_arrow.names
            for column in columns:
                if column not in names:
                    raise DataError(
                        f"column missing in {path}",
                        column,
                        "a column of the file",
                        nearest(column, names),
                    )
                if names.count(column) > 1:
                    got, fix = f"{names.count(column)} columns of that name", "rename all but one"
                    raise DataError(f"column '{column}' of {path}", got, "one", fix)
            return file.read(columns=list(columns), use_threads=local)
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            "data cannot be read as Parquet",
            path,
            "an intact Parquet file",
            f"the reader says: {reason}",
        ) from error


def texts(table: pa.Table, column: str, url: str) -> list[str]:
    """A column of strings. Raises DataError for another type or a missing value."""
    values = table[column]
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise DataError(
            f"column '{column}' of {url}", str(values.type), "strings", "name the text column"
        )
    _refuse_nulls(values, column, url)
    with contextlib.suppress(UnicodeDecodeError):  # its text quotes the record
        return values.to_pylist()
    raise DataError(
        f"column '{column}' of {url}",
        "bytes that are no text",
        "strings in UTF-8",
        "convert the column",
    )


def labels(table: pa.Table, column: str, url: str, classes: int) -> np.ndarray:
    """A column of class labels, int64 (N,). Raises DataError for another type, a missing value, or
    a label outside [0, classes).
    """
    values = table[column]
    if not pa.types.is_integer(values.type):
        raise DataError(
            f"column '{column}' of {url}", str(values.type), "integers", "name the label column"
        )
    _refuse_nulls(values, column, url)
    found = values.to_numpy().astype(np.int64)
    outside = np.flatnonzero((found < 0) | (found >= classes))
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"label in row {row} of column '{column}' of {url}",
            "another number",  # which one is a record's
            f"0 to {classes - 1}",
            "correct the file, or set the task's number of classes",
        )
    return found


def _refuse_nulls(values: pa.ChunkedArray, column: str, url: str) -> None:
    if values.null_count:
        raise DataError(
            f"column '{column}' of {url}",
            f"{values.null_count} missing values",
            "a value in every row",
            "drop those rows",
        )


def fingerprint(table: pa.Table) -> str:
    """32 hexadecimal digits that depend on the rows' content and order, not on files, chunks or
    compression (SHA-256).

    Integers of different widths are the same content; floats are not.

    A copy that was edited or put in another order has another fingerprint, so it gets another
    ledger: whoever trains on both must add their budgets up.

    Raises:
        DataError: a column of another type.
    """
    digest = hashlib.sha256()
    for name in sorted(table.column_names):
        digest.update(f"{name}|{len(table[name])}|".encode())
        _take_in(digest, table[name], name)
    return digest.hexdigest()[:32]


def fingerprint_columns(table: pa.Table) -> tuple[str, ...]:
    """A fingerprint of each column, whatever it is called, by which another table with some of them
    is recognised.

    Columns that say too little (`tells`), as a constant one does, are skipped: unrelated tables
    may share them.

    Raises:
        DataError: see `fingerprint`.
    """
    found = []
    for name in table.column_names:
        column = table[name]
        first = column.slice(0, LOOKED_AT)
        numbers = first.to_numpy() if pa.types.is_integer(column.type) else None
        if tells(
            len(column), {str(value).encode() for value in first.unique().to_pylist()}, numbers
        ):
            digest = hashlib.sha256(f"{len(column)}|".encode())
            _take_in(digest, column, name)
            found.append(digest.hexdigest()[:32])
    return tuple(found)


def tells(rows: int, distinct: Collection[bytes], numbers: np.ndarray | None = None) -> bool:
    """Whether a column says so much that an unrelated one would agree with it by chance once in
    2^64 at most.

    It says how its values are arranged, and, where most are different, the values themselves, about
    as many bits as they compress to. A constant column and one of row numbers say nothing.

    Args:
        rows: of the column. distinct: the different values among its first `LOOKED_AT` rows.
            numbers: these rows, of a column of integers.
    """
    if len(distinct) < 2 or (
        numbers is not None and numbers.ndim == 1 and len(set(np.diff(numbers).tolist())) == 1
    ):
        return False
    bits = rows * math.log2(len(distinct))
    if 2 * len(distinct) >= min(rows, LOOKED_AT):
        bits += 8 * max(0, len(zlib.compress(b"".join(sorted(distinct)))) - _ZLIB_BYTES)
    return bits >= _CHANCE_BITS


def _take_in(digest: Any, column: pa.ChunkedArray, name: str) -> None:
    """Adds a column's content."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        lengths = pc.call_function("binary_length", [column]).to_numpy()
        digest.update(lengths.astype("<i8").tobytes())
        for chunk in column.chunks:
            digest.update(b"".join(value.as_buffer() for value in chunk if value.is_valid))
        return
    values = column.to_numpy()
    if values.dtype.kind in "biu":  # the same numbers are the same data in any width
        digest.update(values.astype("<i8").tobytes())
    elif values.dtype.kind == "f":
        digest.update(values.dtype.str.encode() + values.tobytes())
    else:
        raise DataError(
            f"column '{name}'", str(column.type), "strings, integers or floats", "convert it"
        )


def fingerprint_arrays(*arrays: np.ndarray) -> str:
    """As `fingerprint`, of numeric arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]
