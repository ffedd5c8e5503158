"""A prepared set in shards at a URL, for clusters: a node fetches those that its ranks train on.

Beside the shards, an index holds what every node needs of all records: lengths, columns of fixed
size, row hashes, units. It is fetched whole, and a few bytes a record.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from filelock import FileLock
from torch import Tensor

from grape_ray.data.arrays import Digests, Ragged, Records
from grape_ray.data.cache import cache_folder
from grape_ray.data.prepared import (
    INDEX,
    TRAIN,
    VALIDATION,
    CheckedTables,
    Encoder,
    PreparedSet,
    Split,
    encode_train,
)
from grape_ray.data.record_files import RecordsWriter, read_records
from grape_ray.data.units import Units
from grape_ray.errors import DataError
from grape_ray.storage import Json, Storage

_FORMAT = 2
_ARRAYS = "arrays.npz"  # of all records: offsets, fixed columns, row hashes, units, shard bounds
_SHARD = re.compile(r"train-\d{5,}\.arrow")
_OPEN_SHARDS = 64  # mapped at a time


@dataclass(frozen=True)
class EncodedShard:
    """What is known of one shard once it is written.

    Attributes:
        arrays: lengths of each record's sequences by column, fixed columns, row hashes, hashes of
            units. held_out: the records held out of it, as the bytes of a file; empty for none.
        digest: of the shard's file; empty where there is none.
    """

    arrays: Mapping[str, np.ndarray]
    held_out: bytes
    digest: str


def encode_shard(
    split: Split, encoder: Encoder, tables: CheckedTables, number: int, url: str
) -> EncodedShard:
    """Encodes one shard's rows and puts its file to `url`; any process of a cluster may do so."""
    with tempfile.TemporaryDirectory(prefix="grape-ray-") as name:
        folder = Path(name)
        writers = {name: RecordsWriter(folder / name) for name in (TRAIN, VALIDATION)}
        marks = encode_train(split, encoder, tables, writers)
        for writer in writers.values():
            writer.finish()
        held = folder / VALIDATION
        held_out = held.read_bytes() if held.exists() else b""
        if not (folder / TRAIN).exists():
            return EncodedShard({"marks": marks}, held_out, "")
        records = read_records(folder / TRAIN)
        assert records.digests is not None
        content = (folder / TRAIN).read_bytes()
        Storage(url).write(_shard_name(number), content, private=True)
        arrays: dict[str, np.ndarray] = {"marks": marks, "rows": np.array(records.digests.rows)}
        for name, column in records.columns.items():
            if isinstance(column, Ragged):
                arrays[f"lengths {name}"] = np.diff(column.offsets)
            else:
                arrays[f"fixed {name}"] = np.array(column)
        return EncodedShard(arrays, held_out, _digest(content))


def write_index(
    url: str, split: Split, tables: CheckedTables, identity: Json, shards: list[EncodedShard],
    validation: Path,
) -> None:  # fmt: skip
    """Writes what every node needs, last of all: a set without an index is none.

    Args:
        identity: of the encoding, that whoever opens the set compares with its own. validation:
            the file of the validation records.
    """
    full = [shard for shard in shards if shard.digest]
    sizes = [len(shard.arrays["rows"]) for shard in full]
    arrays = {"starts": np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])}
    for name in full[0].arrays:
        joined = np.concatenate([shard.arrays[name] for shard in full])
        kind, _, column = name.partition(" ")
        if kind == "lengths":
            zero = np.zeros(1, np.int64)
            arrays[f"offsets {column}"] = np.concatenate([zero, np.cumsum(joined, dtype=np.int64)])
        elif name == "marks" and split.unit:
            units = Units.of(np.unique(joined, return_inverse=True)[1])
            arrays |= {"unit offsets": units.offsets, "unit records": units.order}
        elif name != "marks":
            arrays[name] = joined
    packed = io.BytesIO()
    np.savez(packed, **arrays)  # pyright: ignore[reportArgumentType]
    place, files = Storage(url), {VALIDATION: validation.read_bytes(), _ARRAYS: packed.getvalue()}
    for name, content in files.items():
        place.write(name, content, private=True)
    digests = {_shard_name(n): shard.digest for n, shard in enumerate(shards) if shard.digest}
    digests |= {name: _digest(content) for name, content in files.items()}
    index = {**tables.index, "format": _FORMAT, "identity": identity, "files": digests}
    place.write(INDEX, json.dumps(index).encode(), private=True)


def is_sharded_set(url: str) -> bool:
    """Whether a prepared set in shards lies there."""
    if not url or "*" in url or not ("://" in url or os.path.isdir(url)):
        return False
    try:
        return Storage(url).exists(INDEX) and Storage(url).exists(_ARRAYS)
    except Exception:  # nothing that can be reached: told by whoever reads it as records
        return False


def open_sharded_set(url: str, identity: Json) -> PreparedSet:
    """A prepared set whose shards are fetched when a record of theirs is asked for.

    Raises:
        DataError: it was prepared for another task, tokenizer or unit, or is damaged: its files are
            not those that the index was written with.
    """
    place = Storage(url)
    index: Json = json.loads(place.read(INDEX))
    known = index.get("identity", {})
    differing = sorted(key for key in identity if known.get(key) != identity[key])
    if index.get("format") != _FORMAT or differing:
        raise DataError(
            f"the prepared set {url} is of another {', '.join(differing) or 'version'}",
            None,
            "the one that this task would make",
            "prepare it again with `grape-ray prepare`, or use the settings that it was made with",
        )
    store = _ShardStore(url, index["files"])
    arrays = np.load(store.fetched(_ARRAYS), allow_pickle=False)
    starts, columns = arrays["starts"], dict[str, np.ndarray | Ragged]()
    for name in arrays.files:
        kind, _, column = name.partition(" ")
        if kind == "fixed":
            columns[column] = arrays[name]
        elif kind == "offsets":
            columns[column] = ShardedRagged(np.empty(0), arrays[name], column, store, starts)
    digests = Digests(store.digest, (), arrays["rows"])
    return PreparedSet(
        Records(columns, digests, starts),
        read_records(store.fetched(VALIDATION)),
        index["dataset_id"],
        tuple(index["columns"]),
        index["facts"],
        Units(arrays["unit offsets"], arrays["unit records"]) if index["unit"] else None,
        tuple(index["validation_source"]),
    )


@dataclass(frozen=True)
class ShardedRagged(Ragged):
    """A column of sequences whose values lie in shards; `offsets` are those of all records.

    Attributes:
        name: of the column. store: of the shards. starts: (S + 1,) the first record of each.
    """

    name: str
    store: _ShardStore
    starts: np.ndarray

    def __getitem__(self, index: int) -> np.ndarray:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        column = self.store.records(shard).sequences(self.name)
        return column[int(index - self.starts[shard])]

    def take(self, indices: np.ndarray) -> Ragged:
        found = [self[int(index)] for index in indices]
        return Ragged.of(found, found[0].dtype.type if found else np.int32)

    def padded(self, indices: np.ndarray, fill: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
        return self.take(indices).padded(np.arange(len(indices)), fill, multiple)


class _ShardStore:
    """The files of a set, each fetched once a machine, by whoever asks first.

    Whoever can write to a URL may have written what is there: files have names of this module's own
    and the content that the index says, and they are kept by that content, so that a set that took
    the place of another is not mixed up with it.

    Args:
        files: digests of the content, by name.

    Attributes:
        digest: of all files.
    """

    def __init__(self, url: str, files: Mapping[str, str]):
        wanted = {VALIDATION, _ARRAYS}
        self._shards = [name for name in files if name not in wanted]
        if not files.keys() >= wanted or not all(map(_SHARD.fullmatch, self._shards)):
            raise _damaged(url, "an index of other files")
        self._url, self._files = url, files
        self.digest = _digest(json.dumps(sorted(files.items())).encode())

    def records(self, shard: int) -> Records:
        return _opened(str(self.fetched(self._shards[shard])))

    def fetched(self, name: str) -> Path:
        """The file on this machine. Raises DataError for one of other content."""
        folder = cache_folder().with_name("shards") / self.digest
        place = folder / name
        if not place.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(f"{place}.lock"):
                if not place.exists():
                    content = Storage(self._url).read(name)
                    if _digest(content) != self._files[name]:
                        raise _damaged(self._url, f"other content in {name}")
                    part = place.with_name(f"{name}.part")
                    part.write_bytes(content)
                    os.replace(part, place)
        return place


def _damaged(url: str, got: str) -> DataError:
    fix = "prepare it again, in a new place"
    return DataError(f"the prepared set {url} is damaged", got, "the files of its index", fix)


@lru_cache(maxsize=_OPEN_SHARDS)
def _opened(path: str) -> Records:
    return read_records(Path(path))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _shard_name(number: int) -> str:
    return f"train-{number:05d}.arrow"
