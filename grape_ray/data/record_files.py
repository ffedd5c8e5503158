"""Records as an Arrow file that is mapped: written batch by batch, read without a copy.

Each column of the file is one contiguous array, so that what is mapped is what `Records` holds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from grape_ray.data.arrays import Digests, Ragged, Records
from grape_ray.data.fingerprints import digests_of, row_hashes

_ROWS = "row hash"  # the column of hashes, beside those of the records
_DIGESTS = b"grape_ray digests"


class RecordsWriter:
    """Takes records in batches and writes them to one file; memory does not grow with them.

    Args:
        path: of the file, which is there only once `finish` has returned.
    """

    def __init__(self, path: Path):
        self._path, self._columns = path, dict[str, _ColumnFile]()

    def append(self, records: Records) -> None:
        """Adds records; all batches have the same columns."""
        for name, column in {**records.columns, _ROWS: row_hashes(records)}.items():
            if name not in self._columns:
                spool = self._path.with_name(f"{self._path.name}.{len(self._columns)}")
                self._columns[name] = _ColumnFile(spool, column)
            self._columns[name].append(column)

    def finish(self) -> None:
        """Writes the file. With no record appended it is not written."""
        if not self._columns:
            return
        arrays = {name: column.array() for name, column in self._columns.items()}
        table = pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))
        records, rows = _records(table)
        digests = digests_of(records, rows)
        known = json.dumps({"whole": digests.whole, "columns": digests.columns})
        schema = table.schema.with_metadata({_DIGESTS: known.encode()})
        partial = self._path.with_name(f"{self._path.name}.part")
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(table.replace_schema_metadata(schema.metadata))
        os.replace(partial, self._path)
        for column in self._columns.values():
            column.remove()


def read_records(path: Path) -> Records:
    """The records of a file, mapped."""
    with pa.ipc.open_file(pa.memory_map(str(path))) as file:
        table = file.get_batch(0)
        known = json.loads(file.schema.metadata[_DIGESTS])
    records, rows = _records(table)
    return Records(records.columns, Digests(known["whole"], tuple(known["columns"]), rows))


def _records(batch: pa.RecordBatch) -> tuple[Records, np.ndarray]:
    """The records of a batch and their row hashes, both views."""
    columns = {name: _view(batch.column(name)) for name in batch.schema.names}
    rows = columns.pop(_ROWS)
    assert isinstance(rows, np.ndarray)
    return Records(columns), rows


def _view(array: pa.Array) -> np.ndarray | Ragged:
    if isinstance(array, pa.LargeListArray):
        return Ragged(array.values.to_numpy(), array.offsets.to_numpy())
    shape: list[int] = []
    while isinstance(array, pa.FixedSizeListArray):
        shape.append(array.type.list_size)
        array = array.flatten()
    return array.to_numpy().reshape(-1, *shape)


class _ColumnFile:
    """One column's values, and of sequences their offsets, appended to plain files."""

    def __init__(self, path: Path, like: np.ndarray | Ragged):
        values = like.values if isinstance(like, Ragged) else like
        self._dtype, self._shape = values.dtype, values.shape[1:]
        self._paths = (path, path.with_suffix(path.suffix + "o"))
        self._values: BinaryIO = path.open("wb")
        self._offsets: BinaryIO | None = None
        self._end = 0
        if isinstance(like, Ragged):
            self._offsets = self._paths[1].open("wb")
            self._offsets.write(np.zeros(1, np.int64).tobytes())

    def append(self, column: np.ndarray | Ragged) -> None:
        values = column.values if isinstance(column, Ragged) else column
        self._values.write(np.ascontiguousarray(values, self._dtype).data)
        if isinstance(column, Ragged) and self._offsets is not None:
            self._offsets.write((column.offsets[1:] + self._end).data)
            self._end += int(column.offsets[-1])

    def array(self) -> pa.Array:
        """The column as an Arrow array over its mapped files."""
        self._values.close()
        flat = _mapped(self._paths[0], self._dtype)
        if self._offsets is not None:
            self._offsets.close()
            return pa.LargeListArray.from_arrays(_mapped(self._paths[1], np.dtype(np.int64)), flat)
        for size in reversed(self._shape):
            flat = pa.FixedSizeListArray.from_arrays(flat, size)
        return flat

    def remove(self) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)


def _mapped(path: Path, dtype: np.dtype) -> pa.Array:
    size = path.stat().st_size
    buffer = pa.memory_map(str(path)).read_buffer() if size else pa.py_buffer(b"")
    return pa.Array.from_buffers(pa.from_numpy_dtype(dtype), size // dtype.itemsize, [None, buffer])
