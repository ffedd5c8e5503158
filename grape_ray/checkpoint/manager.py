"""A run's checkpoints: written in the background, as deltas where small, restored by any ranks."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from grape_ray import checkpoint
from grape_ray.checkpoint import Checkpoint, Coordinates, State, Writer, rank_state
from grape_ray.config.methods import METHODS
from grape_ray.config.schema import Config
from grape_ray.distributed import sharding
from grape_ray.distributed.comms import Comms
from grape_ray.engines.capture.model_state import UntrainedState
from grape_ray.errors import CheckpointError, GrapeRayError, StorageError
from grape_ray.optim import Optimizer
from grape_ray.privacy.rank_zero import on_rank_zero
from grape_ray.storage import Json, Storage


class Occasion(enum.Enum):
    """Why a checkpoint is made; one that is merely due may be skipped while the upload of an
    earlier one is in flight.
    """

    DUE = "due"
    URGENT = "urgent"
    LAST = "last"


@dataclass(frozen=True)
class Restored:
    """The checkpoint that a run resumes from; by default there is none.

    Attributes:
        name: its folder. step: steps that the model has taken. metadata: what `save` was given.
    """

    name: str = ""
    step: int = 0
    metadata: Json = field(default_factory=dict)

    @property
    def executed_steps(self) -> int:
        """Steps that the run had executed until then, as far as is known."""
        return int(self.metadata.get("executed_steps", 0))


class CheckpointManager:
    """Makes and restores a run's checkpoints; every rank calls every method, at the same steps.

    First `restore` or `begin_from`, if at all, then `begin_attempt`, then `save`. A checkpoint that
    is merely due is skipped while the upload of the one before is in flight, so that slow storage
    never stops training; one that is urgent, or the last, waits for it and is waited for.

    Attributes:
        attempt: the number that names the folders of this attempt's checkpoints.
        on_commit: given (name, metadata) of each committed checkpoint, on every rank.
        newest: name of the newest committed checkpoint, as far as this rank knows.
        skipped: how many were skipped.
        failure: why the one before could not be written; a second failure in a row is raised.
    """

    def __init__(
        self, config: Config, comms: Comms, folder: Storage, model: nn.Module, optimizer: Optimizer
    ):
        self._config, self._comms, self._folder = config, comms, folder
        self._model, self._optimizer = model, optimizer
        performance = config.performance
        self._writer = Writer(
            folder, comms, performance.keep_checkpoints, performance.checkpoint_timeout_s
        )
        self._coordinates = (
            Coordinates(optimizer.subspace)
            if performance.delta_checkpoints and _lifts_exactly(config, optimizer)
            else None
        )
        optimizer.recorder = self._coordinates
        self._untrained: UntrainedState | None = None
        self._metadata: Json = {}
        self.attempt, self.newest, self.skipped = 0, "", 0
        self.failure: GrapeRayError | None = None
        self.on_commit: Callable[[str, Json], None] = lambda name, metadata: None

    @property
    def lag_s(self) -> float:
        """Seconds from the newest checkpoint's copy to its manifest, or until now."""
        return self._writer.lag_s

    def restore(self) -> Restored:
        """Takes the state of the newest checkpoint that every rank can read, whatever number of
        ranks wrote it.

        Torn and damaged ones are passed over with a warning.

        Raises:
            StorageError: the storage cannot be read. CheckpointError: the checkpoint holds another
                model.
        """
        comms = self._comms
        # One listing for all: two may differ, and ranks that restore different steps would train
        # different models.
        for name in on_rank_zero(comms, partial(checkpoint.names, self._folder)):
            # One rank that cannot read a checkpoint is enough for all to pass it over.
            found = _attempted(partial(self._read, name))
            errors = comms.gather_objects(found if isinstance(found, GrapeRayError) else None)
            torn = [error for error in errors if isinstance(error, CheckpointError)]
            other = [error for error in errors if error is not None and error not in torn]
            if other:
                raise other[0]
            if torn:
                checkpoint.pass_over(torn[0])
                continue
            assert isinstance(found, Checkpoint)
            if not sharding.is_sharded(self._model):
                coordinates = self._load(found)
                # Deltas continue from the full checkpoint of the one that was restored.
                if self._coordinates is not None and coordinates is not None:
                    self._optimizer.recorder = self._coordinates = coordinates
            self.newest = found.name
            return Restored(found.name, found.step, found.metadata)
        return Restored()

    def _read(self, name: str) -> Checkpoint:
        """A checkpoint, verified; a sharded model has taken its rows by then, and no rank holds the
        whole.
        """
        if not sharding.is_sharded(self._model):
            return checkpoint.load(self._folder, name)
        reader = checkpoint.Reader(self._folder, name)
        rank_state.restore_rows(reader, self._model, self._optimizer)
        return Checkpoint(reader.manifest.step, name, reader.manifest.metadata, {}, {})

    def _load(self, found: Checkpoint) -> Coordinates | None:
        coordinates = checkpoint.restore(self._model, found, self._optimizer.subspace)
        self._optimizer.load_state_dict(found.optimizer)
        return coordinates

    def begin_from(self, folder: Storage, name: str, metadata: Json) -> Restored:
        """Takes the state of another run's checkpoint, and keeps it as this run's own first.

        Args:
            folder: the other run's. metadata: replaces what the other run noted under these keys.
        """
        found = checkpoint.load(folder, checkpoint.of_step(folder, checkpoint.step_of(name)))
        self._load(found)
        self.begin_attempt(0)
        own = {**found.metadata, **metadata}
        # full, and waited for: this run must stand without the other's folder
        self.save(found.step, own, Occasion.LAST)
        return Restored(self.newest, found.step, {"executed_steps": own["executed_steps"]})

    def begin_attempt(self, number: int) -> None:
        """Begins the checkpoints of an attempt; 0 takes the next number that the storage does not
        know, which the ranks agree on.

        From now on what is not trained must stay as it is.
        """
        self.attempt = number or on_rank_zero(self._comms, partial(_next_attempt, self._folder))
        self._untrained = UntrainedState(self._model)

    def save(self, step: int, metadata: Json, occasion: Occasion) -> bool:
        """Whether a checkpoint of `step` was begun. Raises what the two before failed with, or this
        one, if it is waited for.
        """
        if not self._may_begin(wait=occasion is not Occasion.DUE):
            self.skipped += 1
            return False
        name, coordinates = checkpoint.folder_of(step, self.attempt), self._coordinates
        limit = self._config.performance.delta_checkpoints
        # The last one is full: what a run leaves behind are its weights, bit for bit.
        delta = (
            coordinates is not None
            and coordinates.base is not None
            and coordinates.deltas < limit
            and occasion is not Occasion.LAST
        )
        self._metadata = metadata
        if delta:
            assert coordinates is not None
            coordinates.deltas += 1
        self._writer.begin(name, step, self._state(metadata, coordinates if delta else None))
        if coordinates is not None and not delta:
            # the copy is made by now: what moves from here on is the next delta's
            coordinates.restart(name)
        if occasion is not Occasion.DUE:
            self.flush()
        return True

    def _may_begin(self, wait: bool) -> bool:
        """Whether no upload is in flight, so that another may begin. One that failed, as on a disk
        that was full for a time, is given up, on every rank.

        Args:
            wait: for the one in flight.
        """
        try:
            if wait:
                self._writer.flush()
            elif not self._writer.ready():
                return False
        except (CheckpointError, StorageError) as error:
            # once, as of a disk that was full for a time; twice is no accident
            if self.failure is not None:
                raise
            self.failure = error
            given_up = self._writer.give_up()
            # a delta of a full checkpoint that was never committed could not be restored
            if self._coordinates is not None and self._coordinates.base == given_up:
                self._coordinates.forget()
            return True
        self.failure = None
        self._report_commit()
        return True

    def flush(self) -> None:
        """Waits until the checkpoint in flight, if any, is committed, and reports it."""
        self._writer.flush()
        self._report_commit()

    def drain(self) -> None:
        """Before this rank ends by an error: what is in flight may still arrive."""
        self._writer.drain()

    def _report_commit(self) -> None:
        """Calls `on_commit` for a checkpoint that was committed since the last call."""
        committed = self._writer.committed
        if committed and committed != self.newest:
            self.newest = committed
            self.on_commit(committed, self._metadata)

    def _state(self, metadata: Json, coordinates: Coordinates | None) -> State:
        """This rank's part: of a full checkpoint, or, given coordinates, of what a delta cannot do
        without.

        Raises:
            UnsupportedLayer: what is not trained differs from the start's: it may hold anything of
                the data, without noise.
        """
        assert self._untrained is not None
        self._untrained.check()
        model, optimizer = rank_state.held(self._model), self._optimizer.state_dict()
        places = {**rank_state.model_places(self._model), **self._optimizer.places()}
        counters: Json = {
            "optimizer": {k: v for k, v in optimizer.items() if not isinstance(v, Tensor)}
        }
        kinds = {
            "model": model,
            "optimizer": {k: v for k, v in optimizer.items() if isinstance(v, Tensor)},
        }
        if coordinates is not None:
            # Projected weights follow from the base and the coordinates; frozen ones did not move.
            frozen = {n for n, p in self._model.named_parameters() if not p.requires_grad}
            left_out = {*self._optimizer.subspace.plan, *frozen}
            kinds["model"] = {n: t for n, t in model.items() if n not in left_out}
            kinds["coordinates"] = coordinates.tensors()
            counters["coordinates"] = coordinates.counters()
        shards = {
            kind: rank_state.shards_of(tensors, places, self._comms)
            for kind, tensors in kinds.items()
        }
        return State(shards, counters, metadata, coordinates.base if coordinates else None)


def _lifts_exactly(config: Config, optimizer: Optimizer) -> bool:
    """Whether weights move by nothing but lifts that a public key makes anew, and lose little to
    rounding: fp32 of method `grape`.
    """
    exact = all(optimizer.params[name].dtype is torch.float32 for name in optimizer.subspace.plan)
    return (
        METHODS[config.method.name].subspace == "gaussian"
        and config.method.moments != "lifted"
        and exact
        and not config.performance.sharded
    )


def _next_attempt(folder: Storage) -> int:
    """A number for a run without a ledger, above those that the storage has seen."""
    return max((int(name.rpartition("-")[2]) for name in checkpoint.names(folder)), default=0) + 1


def _attempted(call: Callable[[], Checkpoint]) -> Checkpoint | GrapeRayError:
    """The result, or the error, which is to be shared with the other ranks before it is raised."""
    try:
        return call()
    except GrapeRayError as error:
        return error
