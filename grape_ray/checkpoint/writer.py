"""Writing checkpoints in the background: a copy of a rank's own shards, streamed while training
goes on, the manifest last.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from grape_ray.checkpoint.manifest import Manifest, retain
from grape_ray.checkpoint.shards import Piece, Shard, snapshot, write
from grape_ray.distributed.comms import Comms
from grape_ray.errors import CheckpointError, GrapeRayError, StorageError
from grape_ray.storage import Json, Storage

_LOOK_EVERY_S = 0.1
_DRAIN_S = 5.0  # with other ranks: one that is gone will not finish its part


@dataclass(frozen=True)
class State:
    """What one rank contributes to a checkpoint.

    Attributes:
        shards: kind of state (`model`, `optimizer`, `coordinates`) -> tensor name -> this rank's
            rows of it. All ranks' shards together are the whole state, each row once.
        counters, metadata, base: as in Manifest; those of rank 0 are kept.
    """

    shards: Mapping[str, Mapping[str, Shard]]
    counters: Json = field(default_factory=dict)
    metadata: Json = field(default_factory=dict)
    base: str | None = None


@dataclass
class _Upload:
    """One upload in flight."""

    name: str
    step: int
    began_s: float
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    ended_s: float = 0.0
    bytes: int = 0


class Writer:
    """Streams one checkpoint at a time to storage; `begin`, `ready` and `flush` are called by
    every rank, at the same steps.

    Guarantees: `begin` returns when the state is copied to host memory, and what is written is the
    state of that moment. A checkpoint has a manifest only when every rank's files are whole. What
    fails in the background is raised on every rank by the next `ready` or `flush`. Nothing is
    waited for beyond `deadline_s`.

    Args:
        storage: the run's folder. keep: committed checkpoints kept. deadline_s: from a checkpoint's
            copy to its manifest.
    """

    def __init__(self, storage: Storage, comms: Comms, keep: int, deadline_s: float):
        self._storage, self._comms, self._keep, self._deadline_s = storage, comms, keep, deadline_s
        self._current: _Upload | None = None
        self.committed: str | None = None

    @property
    def lag_s(self) -> float:
        """Seconds that the newest checkpoint took to its manifest, or has taken so far."""
        upload = self._current
        return 0.0 if upload is None else (upload.ended_s or time.monotonic()) - upload.began_s

    def begin(self, name: str, step: int, state: State) -> None:
        """Copies the state and starts to write it. Call it when `ready` says so."""
        # the one part that training waits for
        copies = {kind: snapshot(shards) for kind, shards in state.shards.items()}
        upload = self._current = _Upload(name, step, time.monotonic())
        threading.Thread(
            target=self._run, args=(upload, copies, state), name="checkpoint", daemon=True
        ).start()

    def ready(self) -> bool:
        """Whether no upload is in flight on any rank. Raises CheckpointError or StorageError
        where one has failed on any rank.
        """
        # agreed, or ranks would begin different checkpoints
        states = self._comms.gather_objects(self._look())
        for rank, (_, error) in enumerate(states):
            if error is not None:
                raise (
                    error
                    if isinstance(error, GrapeRayError)
                    else _failed(self._current, rank, error)
                )
        if any(busy for busy, _ in states):
            return False
        self.committed = self._current.name if self._current else self.committed
        return True

    def flush(self) -> None:
        """Waits until the upload in flight, if any, is committed. Raises as `ready` does."""
        while not self.ready():
            if self._current:
                self._current.done.wait(_LOOK_EVERY_S)

    def give_up(self) -> str | None:
        """Forgets a checkpoint that has failed, so that another can be begun; returns its name."""
        upload, self._current = self._current, None
        return upload.name if upload else None

    def drain(self) -> None:
        """Gives the upload in flight a little time, when this rank ends by an error; speaks to
        no other rank.
        """
        if self._current:
            self._current.done.wait(self._deadline_s if self._comms.world_size == 1 else _DRAIN_S)

    def _look(self) -> tuple[bool, Exception | None]:
        """(in flight, what failed) of this rank."""
        upload = self._current
        if upload is None:
            return False, None
        if upload.done.is_set():
            return False, upload.error
        if time.monotonic() - upload.began_s > self._deadline_s:
            fix = "raise performance.checkpoint_timeout_s, or checkpoint to faster storage"
            return False, CheckpointError(
                f"{upload.name} was not written in time",
                f"{self._deadline_s:g} s",
                "an end of the upload",
                fix,
            )
        return True, None

    def _run(
        self, upload: _Upload, copies: Mapping[str, Mapping[str, Shard]], state: State
    ) -> None:
        try:
            pieces, files = {}, {}
            for kind, shards in copies.items():
                file = (
                    f"{kind}-{self._comms.rank + 1:05d}-of-{self._comms.world_size:05d}.safetensors"
                )
                files[file], pieces[kind] = write(self._storage, upload.name, file, shards)
            if self._comms.rank == 0:
                self._commit(upload, pieces, files, state)
            else:
                receipt = {
                    "files": files,
                    "pieces": {
                        k: [dataclasses.asdict(p) for p in listed] for k, listed in pieces.items()
                    },
                }
                self._storage.write(
                    _receipt(upload.name, self._comms.rank), json.dumps(receipt).encode()
                )
            upload.bytes = sum(files.values())
        except Exception as error:
            # raised on every rank by the next `ready` or `flush`
            upload.error = error
        upload.ended_s = time.monotonic()
        upload.done.set()

    def _commit(
        self, upload: _Upload, pieces: dict[str, list[Piece]], files: dict[str, int], state: State
    ) -> None:
        """Rank 0: when all ranks have written theirs, the manifest, and then away with what is no
        longer kept.
        """
        for rank in range(1, self._comms.world_size):
            theirs = self._await_receipt(upload, rank)
            files |= theirs["files"]
            for kind, listed in theirs["pieces"].items():
                pieces[kind] += [Piece.from_json(p) for p in listed]
        Manifest(
            upload.step, upload.name, pieces, files, state.counters, state.metadata, state.base
        ).commit(self._storage)
        try:
            for rank in range(1, self._comms.world_size):
                self._storage.remove(_receipt(upload.name, rank))
            retain(self._storage, self._keep)
        except StorageError as error:  # the checkpoint is whole; what is too many goes next time
            warnings.warn(f"old checkpoints could not be removed: {error}", stacklevel=2)

    def _await_receipt(self, upload: _Upload, rank: int) -> Json:
        pause_s = _LOOK_EVERY_S
        while time.monotonic() - upload.began_s < self._deadline_s:
            try:
                return json.loads(self._storage.read(_receipt(upload.name, rank)))
            except FileNotFoundError:
                time.sleep(pause_s)
                pause_s = min(1.5 * pause_s, 1.0)
        raise CheckpointError(
            f"rank {rank} did not finish {upload.name}",
            f"{self._deadline_s:g} s",
            "its files in storage",
            "run again",
        )


def _receipt(name: str, rank: int) -> str:
    """Where a rank says what it has written; a folder belongs to one attempt, so no other attempt's
    is found there.
    """
    return f"{name}/rank-{rank + 1:05d}.json"


def _failed(upload: _Upload | None, rank: int, error: Exception) -> CheckpointError:
    what = f"{upload.name if upload else 'a checkpoint'} could not be written by rank {rank}"
    return CheckpointError(
        what,
        f"{type(error).__name__}: {error}",
        "storage that takes it",
        "see the cause, then run again",
    )
