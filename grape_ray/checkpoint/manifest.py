"""Manifests: the small file, written last, that makes a checkpoint count; and which checkpoints a
run has and keeps.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from grape_ray.checkpoint.shards import Piece
from grape_ray.errors import CheckpointError
from grape_ray.storage import Json, Storage

FORMAT = 2
MANIFEST = "manifest.json"
_FOLDER = "checkpoints/step-"
_NAME = re.compile(r"checkpoints/step-\d{8,}-attempt-\d{4,}")
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_INSTEAD = "an earlier one is used instead"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds and where; no secret and nothing of the data.

    Attributes:
        step: steps that its model has taken. name: its folder below the run's.
        pieces: kind of state (`model`, `optimizer`, `coordinates`) -> its pieces. files: file ->
            bytes.
        counters: the numbers of the state that are no tensors. metadata: what was kept beside the
            state, such as the ledger's head.
        base: the full checkpoint that a delta starts from; None for a full one.
    """

    step: int
    name: str
    pieces: Mapping[str, list[Piece]]
    files: Mapping[str, int]
    counters: Json = field(default_factory=dict)
    metadata: Json = field(default_factory=dict)
    base: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes of its files, without the manifest."""
        return sum(self.files.values())

    def commit(self, storage: Storage) -> None:
        """Writes it, and with it the checkpoint counts."""
        fields = {**dataclasses.asdict(self), "format": FORMAT}
        del fields["name"]
        fields["facts"] = fields.pop("metadata")  # its name in files
        storage.write(
            f"{self.name}/{MANIFEST}", json.dumps(fields, indent=1, sort_keys=True).encode()
        )


def folder_of(step: int, attempt: int = 1) -> str:
    """Name of the checkpoint that an attempt makes of a step, below a run's folder; no two attempts
    write into one folder.
    """
    return f"{_FOLDER}{step:08d}-attempt-{attempt:04d}"


def step_of(name: str) -> int:
    """The step of a checkpoint's name."""
    return int(name.removeprefix(_FOLDER)[:8])


def names(storage: Storage) -> list[str]:
    """Folders of the run's checkpoints, the newest first, whole or not."""
    return sorted({"/".join(n.split("/")[:2]) for n in storage.list(_FOLDER)}, reverse=True)


def of_step(storage: Storage, step: int) -> str:
    """The checkpoint of a step, of the latest attempt that made one. Raises CheckpointError where
    there is none.
    """
    files = set(storage.list(f"{_FOLDER}{step:08d}-"))
    whole = [f for f in names(storage) if f"{f}/{MANIFEST}" in files]
    if not whole:
        raise CheckpointError(
            f"no checkpoint of step {step} in {storage.url}",
            None,
            "a whole one",
            "it may have been removed by retention",
        )
    return whole[0]


def read_manifest(storage: Storage, name: str) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, of another format, or names what lies elsewhere or
            cannot be its base.
    """
    try:
        fields = json.loads(storage.read(f"{name}/{MANIFEST}"))
        if (found := fields.pop("format")) != FORMAT:
            raise CheckpointError(
                f"checkpoint {name}",
                f"format {found}",
                f"format {FORMAT}",
                "use the version that wrote it",
            )
        pieces = {
            kind: [Piece.from_json(p) for p in listed]
            for kind, listed in fields.pop("pieces").items()
        }
        metadata = fields.pop("facts")
        found = Manifest(**fields, name=name, pieces=pieces, metadata=metadata)
        _check_names(found)
        return found
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint {name} is torn: no manifest", None, "all its files", _INSTEAD
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {name} is torn: damaged manifest", str(error), "JSON", _INSTEAD
        ) from error


def _check_names(manifest: Manifest) -> None:
    """Refuses files that are not the checkpoint's own, and a base that is no other checkpoint of
    the run. Raises ValueError.
    """
    for file in {
        *manifest.files,
        *(piece.file for listed in manifest.pieces.values() for piece in listed),
    }:
        if not _FILE.fullmatch(file):
            raise ValueError(f"a file {file!r} outside its folder")
    if manifest.base is not None and (
        manifest.base == manifest.name or not _NAME.fullmatch(manifest.base)
    ):
        raise ValueError(f"a base {manifest.base!r} that is no other checkpoint")


def retain(storage: Storage, keep: int) -> None:
    """Removes all but the newest `keep` committed checkpoints and their bases, and the torn ones
    older than those.
    """
    files = set(storage.list(_FOLDER))
    folders = sorted({"/".join(n.split("/")[:2]) for n in files}, reverse=True)
    committed = [f for f in folders if f"{f}/{MANIFEST}" in files]
    if len(committed) < keep:
        return
    kept = set(committed[:keep])
    for name in committed[:keep]:
        try:
            # a delta is nothing without its base
            kept |= {read_manifest(storage, name).base or name}
        except CheckpointError:
            continue
    for name in folders:
        # newer ones without a manifest may be uploads in flight
        if name < committed[keep - 1] and name not in kept:
            # first, so that a half-removed checkpoint does not count
            storage.remove(f"{name}/{MANIFEST}")
            storage.remove(name)
