"""What tells datasets apart, and what they have in common: fingerprints of records, of their
columns and of their rows.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Collection

import numpy as np

from grape_ray.data.arrays import Digests, Ragged, Records

LOOKED_AT = 4096  # first rows of a column, by which it is judged how much it tells
_CHANCE_BITS, _ZLIB_BYTES = 64, 16  # the latter of every compressed text, however short
_BLOCK = 1 << 20  # rows compared together


def fingerprint_records(records: Records) -> str:
    """32 hexadecimal digits that depend on every column's content and on the rows' order
    (SHA-256).
    """
    if records.digests:
        return records.digests.whole
    return fingerprint_arrays(
        *(part for column in records.columns.values() for part in _parts(column))
    )


def column_fingerprints(records: Records) -> tuple[str, ...]:
    """A fingerprint of each column that tells datasets apart, whatever it is called: see
    `tells`.
    """
    if records.digests:
        return records.digests.columns
    return tuple(
        fingerprint_arrays(*_parts(column))
        for column in records.columns.values()
        if tells(len(column), _distinct(column), _numbers(column))
    )


def row_hashes(records: Records) -> np.ndarray:
    """(N,) uint64, a hash a row of all its columns by name (BLAKE2b, 64 bits)."""
    if records.digests:
        return records.digests.rows
    columns = [records.columns[name] for name in sorted(records.columns)]
    found = np.empty(len(records), dtype=np.uint64)
    for place in range(len(records)):
        digest = hashlib.blake2b(digest_size=8)
        for column in columns:
            row = column[place].tobytes()
            digest.update(len(row).to_bytes(8, "little") + row)
        found[place] = int.from_bytes(digest.digest(), "little")
    return found


def digests_of(records: Records, rows: np.ndarray) -> Digests:
    """All that recognises the records; `rows` are their row hashes."""
    return Digests(fingerprint_records(records), column_fingerprints(records), rows)


def rows_in_common(one: Records, other: Records) -> int:
    """How many rows of `one` are, column by column, rows of `other`; 0 where they have other
    columns. Two different rows have one hash with a chance of 2^-64.
    """
    if one.columns.keys() != other.columns.keys():
        return 0
    mine, theirs = row_hashes(one), row_hashes(other)
    common = np.zeros(len(mine), dtype=bool)
    for start in range(0, len(theirs), _BLOCK):
        common |= np.isin(mine, theirs[start : start + _BLOCK])
    return int(common.sum())


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


def fingerprint_arrays(*arrays: np.ndarray) -> str:
    """32 hexadecimal digits that depend on the arrays' types, shapes and content (SHA-256)."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


def _distinct(column: np.ndarray | Ragged) -> set[bytes]:
    """The different values among the first rows."""
    return {column[place].tobytes() for place in range(min(len(column), LOOKED_AT))}


def _numbers(column: np.ndarray | Ragged) -> np.ndarray | None:
    """The first rows of a column of integers."""
    return (
        column[:LOOKED_AT] if isinstance(column, np.ndarray) and column.dtype.kind in "iu" else None
    )


def _parts(column: np.ndarray | Ragged) -> tuple[np.ndarray, ...]:
    return (column.values, column.offsets) if isinstance(column, Ragged) else (column,)
