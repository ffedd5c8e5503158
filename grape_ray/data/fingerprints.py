"""What tells datasets apart, and what they have in common: fingerprints of records, of their
columns and of their rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from grape_ray.data.arrays import Ragged, Records
from grape_ray.data.tables import LOOKED_AT, fingerprint_arrays, tells


def fingerprint_records(records: Records) -> str:
    """32 hexadecimal digits that depend on every column's content and on the rows' order
    (SHA-256).
    """
    return fingerprint_arrays(
        *(part for column in records.columns.values() for part in _parts(column))
    )


def column_fingerprints(records: Records) -> tuple[str, ...]:
    """A fingerprint of each column that tells datasets apart, whatever it is called: see
    `tables.tells`.
    """
    found = records.columns.values()
    return tuple(
        fingerprint_arrays(*_parts(column))
        for column in found
        if tells(len(column), _distinct(column), _numbers(column))
    )


def rows_in_common(one: Records, other: Records) -> int:
    """How many rows of `one` are, column by column, rows of `other`; 0 where they have other
    columns.
    """
    if one.columns.keys() != other.columns.keys():
        return 0
    rows = list(_rows(one))
    common = set(rows).intersection(_rows(other))
    return sum(row in common for row in rows)


def _rows(records: Records) -> Iterator[bytes]:
    """A hash a row."""
    columns = [records.columns[name] for name in sorted(records.columns)]
    for place in range(len(records)):
        digest = hashlib.blake2b(digest_size=16)
        for column in columns:
            row = _row(column, place).tobytes()
            digest.update(len(row).to_bytes(8, "little") + row)
        yield digest.digest()


def _row(column: np.ndarray | Ragged, place: int) -> np.ndarray:
    if isinstance(column, Ragged):
        return column.values[column.offsets[place] : column.offsets[place + 1]]
    return column[place]


def _distinct(column: np.ndarray | Ragged) -> set[bytes]:
    """The different values among the first rows."""
    return {_row(column, place).tobytes() for place in range(min(len(column), LOOKED_AT))}


def _numbers(column: np.ndarray | Ragged) -> np.ndarray | None:
    """The first rows of a column of integers."""
    return (
        column[:LOOKED_AT] if isinstance(column, np.ndarray) and column.dtype.kind in "iu" else None
    )


def _parts(column: np.ndarray | Ragged) -> tuple[np.ndarray, ...]:
    return (column.values, column.offsets) if isinstance(column, Ragged) else (column,)
