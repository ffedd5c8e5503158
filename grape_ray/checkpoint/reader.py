"""Reading checkpoints: whole ones, the newest that is intact, or some rows of one tensor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from grape_ray.checkpoint.coordinates import Coordinates
from grape_ray.checkpoint.manifest import names, read_manifest
from grape_ray.checkpoint.shards import read
from grape_ray.engines.subspace import Subspace
from grape_ray.errors import CheckpointError
from grape_ray.privacy.random_streams import STREAMS
from grape_ray.storage import Json, Storage

_INSTEAD = "an earlier one is used instead"


class Reader:
    """One committed checkpoint, from which tensors are read by name, on any number of ranks.

    Raises:
        CheckpointError: no manifest, a file is missing or of another size, or the base is no full
            checkpoint; nothing else was read then.
    """

    def __init__(self, storage: Storage, name: str):
        self.storage, self.manifest = storage, read_manifest(storage, name)
        # Sizes cost one question a file, and find what was torn before gigabytes are read.
        for file, expected in self.manifest.files.items():
            try:
                found = storage.size(f"{name}/{file}")
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"checkpoint file {name}/{file} is missing",
                    None,
                    "all that its manifest names",
                    _INSTEAD,
                ) from error
            if found != expected:
                raise CheckpointError(
                    f"checkpoint file {name}/{file} is torn",
                    f"{found} bytes",
                    f"{expected} bytes",
                    _INSTEAD,
                )
        self._base = self._full(self.manifest.base) if self.manifest.base else None

    def _full(self, base: str) -> Reader:
        """The full checkpoint that a delta moves on from: never a delta, and so never itself."""
        if read_manifest(self.storage, base).base:
            what = f"checkpoint {self.manifest.name} is torn: its base is a delta"
            raise CheckpointError(what, base, "a full checkpoint", _INSTEAD)
        made_with = self.manifest.counters.get("coordinates", {}).get("streams", 1)
        if made_with != STREAMS:
            what = f"checkpoint {self.manifest.name}, in coordinates of another version's"
            got, expected = f"projections {made_with}", f"projections {STREAMS}"
            raise CheckpointError(what, got, expected, _INSTEAD)
        return Reader(self.storage, base)

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind (`model`, `optimizer`, `coordinates`)."""
        # a delta repeats neither projected nor frozen weights
        inherited = self._base.names(kind) if self._base and kind == "model" else []
        return sorted({piece.name for piece in self.manifest.pieces.get(kind, [])} | set(inherited))

    def read(self, kind: str, name: str, start: int = 0, rows: int | None = None) -> Tensor:
        """Rows `start .. start + rows` (all by default) of a tensor; only pieces that hold some of
        them are read, each verified.

        Of a delta's projected weights these are the base's values, which `Coordinates.apply_`
        moves.

        Raises:
            CheckpointError: no such tensor, rows that nobody saved, or a damaged file.
        """
        pieces = sorted(
            (p for p in self.manifest.pieces.get(kind, []) if p.name == name), key=lambda p: p.start
        )
        if not pieces and self._base and kind == "model":
            return self._base.read(kind, name, start, rows)
        if not pieces:
            raise CheckpointError(
                f"checkpoint {self.manifest.name} holds no {kind} tensor",
                name,
                "a saved name",
                "resume the run's own model",
            )
        if not pieces[0].global_shape:  # a scalar has no rows
            return read(self.storage, self.manifest.name, pieces[0])
        end = pieces[0].global_shape[0] if rows is None else start + rows
        # of a tensor without rows, its one piece says its shape and type
        wanted = [p for p in pieces if p.start < end and p.start + p.rows > start] or pieces[:1]
        place, parts = start, []
        for piece in wanted:
            if piece.start > place:  # a gap: rows that no rank has written
                break
            tensor = read(self.storage, self.manifest.name, piece)
            parts.append(tensor[max(place - piece.start, 0) : end - piece.start])
            place = max(place, piece.start + piece.rows)
        if place < end:
            raise CheckpointError(
                f"checkpoint {self.manifest.name} lacks rows of '{name}'",
                f"up to {place}",
                f"up to {end}",
                _INSTEAD,
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, verified.

    Attributes:
        step: steps that its model has taken. name: folder below the run's storage. metadata: what
            was saved beside the state.
        model: parameter and buffer name -> tensor. optimizer: what Optimizer.load_state_dict takes.
        base: of a delta, the full checkpoint whose projected weights `model` holds. coordinates,
            counters: what moves them on.
    """

    step: int
    name: str
    metadata: Json
    model: Mapping[str, Tensor]
    optimizer: Json
    base: str | None = None
    coordinates: Mapping[str, Tensor] = field(default_factory=dict)
    counters: Json = field(default_factory=dict)


def load(storage: Storage, name: str) -> Checkpoint:
    """A checkpoint, every byte of it verified. Raises CheckpointError where anything is missing or
    differs.
    """
    reader = Reader(storage, name)
    tensors = {
        kind: {n: reader.read(kind, n) for n in reader.names(kind)}
        for kind in ("model", "optimizer", "coordinates")
    }
    saved = reader.manifest
    optimizer = {**tensors["optimizer"], **saved.counters["optimizer"]}
    counters = saved.counters.get("coordinates", {})
    return Checkpoint(
        saved.step,
        name,
        saved.metadata,
        tensors["model"],
        optimizer,
        saved.base,
        tensors["coordinates"],
        counters,
    )


def latest(storage: Storage) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None; torn or damaged ones are passed over with a
    warning.
    """
    for name in names(storage):
        try:
            return load(storage, name)
        except CheckpointError as error:
            pass_over(error)
    return None


def pass_over(error: CheckpointError) -> None:
    """Warns of a checkpoint that is not used."""
    warnings.warn(f"checkpoint passed over: {error}", stacklevel=3)


def distinct(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, each tied tensor under its first name only."""
    kept, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # of tied tensors restoring one restores all
            seen.add(id(tensor))
            kept[name] = tensor.detach()
    return kept


def restore(
    model: nn.Module, saved: Checkpoint, subspace: Subspace | None = None
) -> Coordinates | None:
    """Puts a checkpoint's weights into a model, in place; of a delta it returns the coordinates, to
    be counted on.

    Args:
        subspace: of the run's own engine; a delta needs it.

    Raises:
        CheckpointError: names or shapes differ; nothing was changed then.
    """
    mine = distinct(model)
    wrong = sorted(set(mine) ^ set(saved.model)) or sorted(
        n for n in mine if mine[n].shape != saved.model[n].shape
    )
    if wrong:
        fix = "resume with the run's own task"
        raise CheckpointError(
            "the checkpoint holds another model", ", ".join(wrong[:3]), "the run's own model", fix
        )
    if saved.base and subspace is None:
        raise CheckpointError(
            f"checkpoint {saved.name} is a delta",
            None,
            "the subspace that it was made in",
            "pass the engine's",
        )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(saved.model[name])
        if saved.base is None or subspace is None:
            return None
        coordinates = Coordinates(subspace)
        coordinates.load(saved.base, saved.coordinates, saved.counters, mine)
        coordinates.apply_(mine)
        return coordinates
