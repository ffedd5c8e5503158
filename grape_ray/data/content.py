"""The identity of a table: fingerprints of its content, whatever files, chunks or compression it
came in.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from grape_ray.data.fingerprints import LOOKED_AT, tells
from grape_ray.errors import DataError

if TYPE_CHECKING:
    from hashlib import _Hash


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
        integers = pa.types.is_integer(column.type)
        numbers = first.fill_null(0).to_numpy() if integers else None
        if tells(len(column), _distinct(first), numbers):
            digest = hashlib.sha256(f"{len(column)}|".encode())
            _take_in(digest, column, name)
            found.append(digest.hexdigest()[:32])
    return tuple(found)


def _take_in(digest: _Hash, column: pa.ChunkedArray, name: str) -> None:
    """Adds a column's content; of lists and structures that of their parts."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or _is_binary(kind):
        lengths = pc.call_function("binary_length", [column]).fill_null(-1).to_numpy()
        digest.update(lengths.astype("<i8").tobytes())
        for chunk in column.chunks:
            digest.update(b"".join(value.as_buffer() for value in chunk if value.is_valid))
        return
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.call_function("list_value_length", [column]).fill_null(-1).to_numpy()
        digest.update(b"list|" + lengths.astype("<i8").tobytes())
        flat = [chunk.flatten() for chunk in column.chunks]
        _take_in(digest, pa.chunked_array(flat, kind.value_type), name)
        return
    if pa.types.is_struct(kind):
        for index, field in enumerate(kind):
            digest.update(f"field|{field.name}|".encode())
            parts = [chunk.flatten()[index] for chunk in column.chunks]
            _take_in(digest, pa.chunked_array(parts, field.type), name)
        return
    if column.null_count:
        missing = pc.call_function("is_null", [column]).to_numpy()
        digest.update(b"missing|" + missing.tobytes())
        column = column.fill_null(pa.scalar(0).cast(kind))
    values = column.to_numpy()
    if values.dtype.kind in "biu":  # the same numbers are the same data in any width
        digest.update(values.astype("<i8").tobytes())
    elif values.dtype.kind == "f":
        digest.update(values.dtype.str.encode() + values.tobytes())
    else:
        raise DataError(
            f"column '{name}'",
            str(column.type),
            "texts, integers, floats, bytes, or lists and structures of them",
            "convert it",
        )


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _distinct(column: pa.ChunkedArray) -> set[bytes]:
    """The different values, as bytes; of texts their own, which may be no UTF-8."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return {v if isinstance(v, bytes) else str(v).encode() for v in column.to_pylist()}
