"""A prepared set made on a cluster: Ray Data encodes the shards, each where there is room."""

from __future__ import annotations

import logging
import pickle
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from grape_ray.config.schema import Config
from grape_ray.data.columns import Table
from grape_ray.data.prepared import (
    VALIDATION,
    CheckedTables,
    Split,
    check_not_empty,
    checked_tables,
    encode_validation,
    unit_hashes,
)
from grape_ray.data.record_files import RecordsWriter, read_records
from grape_ray.data.shards import EncodedShard, encode_shard, is_sharded_set, write_index
from grape_ray.errors import ConfigError, GrapeRayError, StorageError
from grape_ray.privacy.redaction import run_redacted
from grape_ray.ray_backend.cluster import cluster, set_defaults
from grape_ray.storage import Json, Storage
from grape_ray.tasks.dataset_task import DatasetTask

# columns of the blocks on their way
_SHARD, _ROW = "grape-ray shard number", "grape-ray row number"


def prepare_set(config: Config, url: str, shards: int = 64) -> int:
    """Encodes a pipeline's records on the cluster at hand and writes them to a folder or URL, which
    `task.data` may name from then on; returns the number of training records.

    A unit's records lie in one shard. What must be known of the whole table is checked here first.

    Args:
        shards: how many, at most; several times the number of nodes that will train.

    Raises:
        ConfigError: the task reads no dataset. DataError: its rows cannot be used. TaskFailed: its
            own code failed on them. StorageError: there is a prepared set already, or it cannot be
            written.
    """
    task = config.task
    if not isinstance(task, DatasetTask):
        expected = "a task that reads a dataset (grape_ray.tasks.dataset_task.DatasetTask)"
        raise ConfigError("the task to prepare", type(task).__name__, expected, "train it as it is")
    if is_sharded_set(url):
        raise StorageError("a prepared set lies there already", url, "a new place", "name another")
    Storage(url).check_writable()
    task.check_together()
    split, identity = task.division(config.privacy.unit), task.encoding(config.privacy.unit)
    with tempfile.TemporaryDirectory(prefix="grape-ray-") as name:
        scratch = Path(name)
        tables = checked_tables(split, task, scratch)
        set_defaults(config.performance.start_timeout_s)
        with cluster(config.performance.workers[1]):
            encoded = _encoded_on_cluster(split, task, tables, url, shards)
        writer = RecordsWriter(scratch / VALIDATION)
        encode_validation(task, tables, writer)
        for number, shard in enumerate(encoded):
            if shard.held_out:
                held = scratch / f"held-{number}.arrow"
                held.write_bytes(shard.held_out)
                writer.append(read_records(held))
        writer.finish()
        check_not_empty("train", any(shard.digest for shard in encoded))
        check_not_empty("validation", (scratch / VALIDATION).exists())
        write_index(url, split, tables, identity, encoded, scratch / VALIDATION)
    return sum(len(shard.arrays["marks"]) for shard in encoded)


def _encoded_on_cluster(
    split: Split, task: DatasetTask, tables: CheckedTables, url: str, shards: int
) -> list[EncodedShard]:
    """The shards in their order, encoded by tasks of Ray Data."""
    import ray.data

    rows = tables.train.rows.append_column(_ROW, pa.array(tables.train.row_numbers, pa.int64()))
    bounds = np.linspace(0, len(rows), min(shards, len(rows)) + 1).astype(np.int64)
    if split.unit:
        rows, bounds = _by_unit(rows, split.unit, bounds)
    blocks: list[pa.Table] = [
        rows.slice(a, b - a).append_column(_SHARD, pa.array([number] * (b - a), pa.int64()))
        for number, (a, b) in enumerate(zip(bounds.tolist(), bounds[1:].tolist()))
        if b > a
    ]
    place, index = tables.train.place, tables.index

    def encode(block: pa.Table) -> pa.Table:
        found: Json = {_SHARD: [], "shard": []}
        numbers = block[_SHARD].to_numpy()
        for number in np.unique(numbers).tolist():
            mine = block.filter(pa.array(numbers == number))
            own = Table(mine.drop_columns([_SHARD, _ROW]), place, mine[_ROW].to_numpy())
            own = CheckedTables(own, None, index)
            shard = partial(encode_shard, split, task, own, number, url)
            try:
                done = run_redacted(shard, task.public)
            except GrapeRayError as error:  # Ray keeps the text of what it sees raised
                done = error
            found[_SHARD].append(number)
            found["shard"].append(pickle.dumps(done))
        return pa.table(found)

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    made = ray.data.from_arrow(blocks).map_batches(encode, batch_format="pyarrow", batch_size=None)
    found: list[Any] = sorted(made.take_all(), key=lambda row: row[_SHARD])
    encoded: list[EncodedShard] = []
    for row in found:
        done = pickle.loads(row["shard"])
        if isinstance(done, GrapeRayError):
            raise done
        encoded.append(done)
    return encoded


def _by_unit(rows: pa.Table, unit: str, bounds: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """The rows sorted by unit, and bounds that part no unit."""
    marks = unit_hashes(rows[unit])
    order = np.argsort(marks, kind="stable")
    marks = marks[order]
    firsts = np.flatnonzero(np.concatenate([[True], marks[1:] != marks[:-1]]))
    ends = np.concatenate([firsts, [len(marks)]])
    return rows.take(pa.array(order)), np.unique(ends[np.searchsorted(ends, bounds)])
