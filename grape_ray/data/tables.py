"""Tables of records: read batch by batch into a file that is mapped, so that none has to fit in
memory.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grape_ray.data.columns import is_list, type_name
from grape_ray.data.sources import Source
from grape_ray.errors import DataError


def read_table(
    source: Source, columns: Sequence[str] | None, folder: Path, texts: Sequence[str] = ()
) -> pa.Table:
    """A split's records as a table that is mapped from files in `folder`.

    Args:
        columns: those that are wanted; None is all. folder: for the copy; it must outlive the
            table. texts: of the columns, those that hold texts: see `readers.batches_of`.

    Raises:
        DataError: nothing there, unreadable, a column missing or there twice, files of different
            columns, or no rows.
    """
    tables = [_mapped(batches, folder) for batches in source.batches(columns, texts)]
    # A file without rows may have columns without types.
    full = [table for table in tables if table.num_rows]
    if not full:
        fix = "check the path"
        raise DataError("data has no rows", source.place, "at least one record", fix)
    for column, names in source.class_names().items():
        if column in full[0].column_names:
            full = [_named(table, column, names) for table in full]
    try:
        table = pa.concat_tables(full, promote_options="permissive")
    except pa.ArrowException:
        names = list(full[0].column_names)
        types = sorted(
            {f"{name} {type_name(t.schema.field(name).type)}" for t in full for name in names}
        )
        failure = DataError(
            f"the files of {source.place} differ",
            ", ".join(types),
            "columns of one type",
            "convert them, or name one file",
        )
    else:
        return table
    raise failure


def _mapped(batches: Iterator[pa.RecordBatch], folder: Path) -> pa.Table:
    """The batches, copied to a file and mapped."""
    path = folder / f"table-{secrets.token_hex(4)}.arrow"
    batches = map(_with_images, batches)
    first = next(batches, None)
    if first is None:
        return pa.table({})
    schema = pa.schema([(field.name, _plain_type(field.type)) for field in first.schema])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in itertools.chain([first], batches):
            if batch.num_rows:
                writer.write_batch(batch.cast(schema) if batch.schema != schema else batch)
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _with_images(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with images as their bytes alone, where they are kept as `datasets` does, beside
    their path.
    """
    for place, field in enumerate(batch.schema):
        names = {part.name for part in field.type} if pa.types.is_struct(field.type) else set()
        if names == {"bytes", "path"}:
            found = batch.column(place).flatten()[field.type.get_field_index("bytes")]
            batch = batch.set_column(place, field.name, found.cast(pa.large_binary()))
    return batch


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values where a column holds categories, as pandas keeps them."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _named(table: pa.Table, column: str, names: Sequence[str]) -> pa.Table:
    """The table with the names of a column's classes in place of their numbers."""
    found = pa.array(names, pa.string())
    chunks = [_taken(found, chunk) for chunk in table[column].chunks]
    place = table.column_names.index(column)
    return table.set_column(place, column, pa.chunked_array(chunks))


def _taken(names: pa.Array, places: pa.Array) -> pa.Array:
    """The names at some places, or in lists at the places in lists."""
    if not is_list(places.type):
        return names.take(places)
    lengths = pc.call_function("list_value_length", [places]).fill_null(0).to_numpy()
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    mask = places.is_null() if places.null_count else None
    return pa.LargeListArray.from_arrays(offsets, names.take(places.flatten()), mask=mask)
