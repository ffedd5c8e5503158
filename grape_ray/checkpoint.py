"""Checkpoints: safetensors files streamed to storage, and a manifest, written last, that makes them count."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grape_ray.errors import CheckpointError, StorageError
from grape_ray.storage import Storage

FORMAT = 1
_BLOCK_BYTES = 8 << 20
_MODEL, _OPTIMIZER, _MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"
_INSTEAD = "an earlier one is used instead"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, verified.

    Attributes:
        step: steps that its model has taken. name: folder below the run's storage. facts: what was saved beside the state.
        model: parameter and buffer name -> tensor. optimizer: what Optimizer.load_state_dict takes.
    """

    step: int
    name: str
    facts: Mapping[str, Any]
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]


def folder_of(step: int) -> str:
    """Name of the checkpoint of a step, below a run's folder."""
    return f"checkpoints/step-{step:08d}"


def save(storage: Storage, step: int, model: nn.Module, optimizer_state: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Writes the checkpoint of `step` and returns its name; it counts from the moment its manifest is there.

    Neither keys nor private data are in it: parameters, moments and step are released values.

    Args:
        facts: JSON values to keep beside the state, such as the ledger's head.

    Raises:
        StorageError: the storage cannot be written.
    """
    name = folder_of(step)
    if storage.exists(name):  # of an earlier attempt, which may have been cut off
        storage.remove(name)
    moments = {k: v for k, v in optimizer_state.items() if isinstance(v, Tensor)}
    counters = {k: v for k, v in optimizer_state.items() if not isinstance(v, Tensor)}
    files = {
        _MODEL: _stream(storage, f"{name}/{_MODEL}", _distinct(model)),
        _OPTIMIZER: _stream(storage, f"{name}/{_OPTIMIZER}", moments),
    }
    manifest = {"format": FORMAT, "step": step, "files": files, "counters": counters, "facts": dict(facts)}
    storage.write(f"{name}/{_MANIFEST}", json.dumps(manifest, indent=1, sort_keys=True).encode())
    return name


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, each tied tensor under its first name only."""
    kept, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach()
    return kept


def _stream(storage: Storage, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes tensors as one safetensors file, never held in memory whole; returns its size and SHA-256."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="grape-ray-") as scratch:
        path = Path(scratch, "tensors")
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        with path.open("rb") as source, storage.open(name, "wb") as target:
            while block := source.read(_BLOCK_BYTES):
                digest.update(block)
                target.write(block)
        return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def latest(storage: Storage) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None; torn or damaged ones are passed over with a warning."""
    steps = sorted({n.split("/")[1] for n in storage.list("checkpoints/step-")}, reverse=True)
    for step_folder in steps:
        name = f"checkpoints/{step_folder}"
        try:
            return load(storage, name)
        except (CheckpointError, StorageError) as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
    return None


def load(storage: Storage, name: str) -> Checkpoint:
    """A checkpoint, with every file's size and hash compared. Raises CheckpointError where anything is missing or differs."""
    manifest = read_manifest(storage, name)
    tensors = {file: _fetch(storage, f"{name}/{file}", facts) for file, facts in manifest["files"].items()}
    optimizer = {**tensors[_OPTIMIZER], **manifest["counters"]}
    return Checkpoint(manifest["step"], name, manifest["facts"], tensors[_MODEL], optimizer)


def read_manifest(storage: Storage, name: str) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError where it is missing or of another format."""
    try:
        manifest = json.loads(storage.read(f"{name}/{_MANIFEST}"))
        if manifest["format"] != FORMAT or {_MODEL, _OPTIMIZER} != set(manifest["files"]):
            raise CheckpointError(f"checkpoint {name}", f"format {manifest['format']}", f"format {FORMAT}", "use the version that wrote it")
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {name} is torn: no manifest", None, "", _INSTEAD) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {name} is torn: damaged manifest", str(error), "JSON", _INSTEAD) from error
    return manifest


def _fetch(storage: Storage, name: str, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one file, if it is what the manifest says."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="grape-ray-") as scratch:
        path = Path(scratch, "tensors")
        try:
            with storage.open(name) as source, path.open("wb") as target:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    target.write(block)
        except FileNotFoundError as error:
            raise CheckpointError(f"checkpoint file {name} is missing", None, "", _INSTEAD) from error
        if (path.stat().st_size, digest.hexdigest()) != (facts["bytes"], facts["sha256"]):
            got = f"{path.stat().st_size} bytes"
            raise CheckpointError(f"checkpoint file {name} is damaged", got, f"{facts['bytes']} bytes, intact", _INSTEAD)
        return load_file(path)


def restore(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Puts saved tensors into a model, in place. Raises CheckpointError where names or shapes differ."""
    mine = _distinct(model)
    wrong = sorted(set(mine) ^ set(saved)) or sorted(n for n in mine if mine[n].shape != saved[n].shape)
    if wrong:
        fix = "resume with the run's own task"
        raise CheckpointError("the checkpoint holds another model", ", ".join(wrong[:3]), "the run's own model", fix)
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(saved[name])


def retain(storage: Storage, keep: int) -> None:
    """Removes all but the newest `keep` committed checkpoints, and the torn ones older than those."""
    names = storage.list("checkpoints/step-")
    folders = sorted({n.split("/")[1] for n in names}, reverse=True)
    committed = [f for f in folders if f"checkpoints/{f}/{_MANIFEST}" in names]
    for folder in folders:
        if committed[:keep] and folder < committed[:keep][-1] and len(committed) >= keep:
            storage.remove(f"checkpoints/{folder}/{_MANIFEST}")  # first, so that a half-removed checkpoint does not count
            storage.remove(f"checkpoints/{folder}")
