"""How a run keeps its state: written in the background, as deltas where these are small, and taken
up again by any number of ranks.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from grape_ray import checkpoint
from grape_ray.checkpoint import Checkpoint, Coordinates, State, Writer, rank_state
from grape_ray.config.methods import METHODS
from grape_ray.config.schema import Config
from grape_ray.distributed import sharding
from grape_ray.distributed.comms import Comms
from grape_ray.engines.capture.model_state import UntrainedState as Start
from grape_ray.engines.subspace import Subspace
from grape_ray.errors import CheckpointError, GrapeRayError, StorageError
from grape_ray.optim import Optimizer
from grape_ray.storage import Storage


class Occasion(enum.Enum):
    """Why a checkpoint is made; one that is merely due may be left out while an earlier one is on
    its way.
    """

    DUE = "due"
    URGENT = "urgent"
    LAST = "last"


class Saver:
    """Makes the checkpoints of one attempt; every rank calls every method, at the same steps.

    A checkpoint that is merely due is left out while the one before is still on its way, so that
    slow storage never stops training; one that is urgent, or the last, waits for it and is waited
    for.

    Args:
        attempt: number of the attempt, which names its folders; 0 takes the next that the storage
            does not know.

    Attributes:
        attempt: the number that names its folders. listeners: told (name, facts) of each committed
            checkpoint, on every rank.
        newest: name of the newest committed checkpoint, as far as this rank was told. skipped: how
            many were left out.
        failure: why the one before could not be written; a second failure in a row is raised.
    """

    def __init__(
        self,
        config: Config,
        comms: Comms,
        folder: Storage,
        model: nn.Module,
        optimizer: Optimizer,
        attempt: int,
    ):
        self._config, self._comms, self._model, self._optimizer = config, comms, model, optimizer
        performance = config.performance
        self.attempt: int = attempt or comms.broadcast_object(
            _next_attempt(folder) if comms.rank == 0 else None
        )
        self._start = Start(model)
        self._writer = Writer(
            folder, comms, performance.keep_checkpoints, performance.checkpoint_timeout_s
        )
        self._facts: Mapping[str, Any] = {}
        self.listeners: list[Callable[[str, Mapping[str, Any]], None]] = []
        self._told = self.newest = ""
        self.skipped, self.failure = 0, cast(GrapeRayError | None, None)
        self._coordinates = (
            Coordinates(optimizer.subspace)
            if performance.delta_checkpoints and _lifts_exactly(config, optimizer)
            else None
        )
        optimizer.recorder = self._coordinates

    @property
    def lag_s(self) -> float:
        """Seconds from the newest checkpoint's copy to its manifest, or until now."""
        return self._writer.lag_s

    def resumed(self, coordinates: Coordinates | None) -> None:
        """Goes on counting from the full checkpoint of the delta that the run was resumed from."""
        if self._coordinates is not None and coordinates is not None:
            self._optimizer.recorder = self._coordinates = coordinates

    def save(self, step: int, facts: Mapping[str, Any], occasion: Occasion) -> bool:
        """Whether a checkpoint of `step` was begun. Raises what the two before failed with, or this
        one, if it is waited for.
        """
        if not self._clear(wait=occasion is not Occasion.DUE):
            self.skipped += 1
            return False
        name, moved = checkpoint.folder_of(step, self.attempt), self._coordinates
        limit = self._config.performance.delta_checkpoints
        delta = (
            moved is not None
            and moved.base is not None
            and moved.deltas < limit
            and occasion is not Occasion.LAST
        )
        self._facts = facts
        if delta:
            assert moved is not None
            moved.deltas += 1
        self._writer.begin(name, step, self._state(facts, moved if delta else None))
        if moved is not None and not delta:
            moved.restart(name)
        if occasion is not Occasion.DUE:
            self.settle()
        return True

    def _clear(self, wait: bool) -> bool:
        """Whether no checkpoint is on its way; one that failed, as on a disk that was full for a
        time, is given up, on every rank.
        """
        try:
            if wait:
                self._writer.settle()
            elif not self._writer.ready():
                return False
        except (CheckpointError, StorageError) as error:
            if self.failure is not None:
                raise
            self.failure = error
            given_up = self._writer.give_up()
            if self._coordinates is not None and self._coordinates.base == given_up:
                self._coordinates.forget()
            return True
        self.failure = None
        self._tell()
        return True

    def settle(self) -> None:
        """Waits until the checkpoint on its way, if any, is committed, and tells of it."""
        self._writer.settle()
        self._tell()

    def linger(self) -> None:
        """Before this rank ends by an error: what is on its way may still arrive."""
        self._writer.linger()

    def _tell(self) -> None:
        committed = self._writer.committed
        if committed and committed != self._told:
            self._told = self.newest = committed
            for listener in self.listeners:
                listener(committed, self._facts)

    def _state(self, facts: Mapping[str, Any], moved: Coordinates | None) -> State:
        """This rank's part: of a full checkpoint, or, given coordinates, of what a delta cannot do
        without.

        Raises:
            UnsupportedLayer: what is not trained differs from the start's: it may hold anything of
                the data, without noise.
        """
        self._start.check()
        model, optimizer = rank_state.held(self._model), self._optimizer.state_dict()
        places = {**rank_state.model_places(self._model), **self._optimizer.places()}
        counters: dict[str, Any] = {
            "optimizer": {k: v for k, v in optimizer.items() if not isinstance(v, Tensor)}
        }
        kinds = {
            "model": model,
            "optimizer": {k: v for k, v in optimizer.items() if isinstance(v, Tensor)},
        }
        if moved is not None:
            frozen = {n for n, p in self._model.named_parameters() if not p.requires_grad}
            kinds["model"] = {
                n: t
                for n, t in model.items()
                if n not in self._optimizer.subspace.plan and n not in frozen
            }
            kinds["coordinates"], counters["coordinates"] = moved.tensors(), moved.counters()
        shards = {
            kind: rank_state.shards_of(tensors, places, self._comms)
            for kind, tensors in kinds.items()
        }
        return State(shards, counters, facts, moved.base if moved else None)


def _lifts_exactly(config: Config, optimizer: Optimizer) -> bool:
    """Whether weights move by nothing but lifts that a public key makes anew, and lose little to
    rounding: fp32 of method `grape`.
    """
    exact = all(optimizer.params[name].dtype is torch.float32 for name in optimizer.subspace.plan)
    return (
        METHODS[config.method.name].subspace == "gaussian"
        and exact
        and not config.performance.sharded
    )


def _next_attempt(folder: Storage) -> int:
    """A number for a run without a ledger, above those that the storage has seen."""
    return max((int(name.rpartition("-")[2]) for name in checkpoint.names(folder)), default=0) + 1


def resume(
    folder: Storage, comms: Comms, model: nn.Module, optimizer: Optimizer, subspace: Subspace
) -> tuple[Checkpoint, Coordinates | None] | None:
    """Takes up the newest checkpoint that every rank can read, whatever number of ranks wrote it;
    None where there is none.

    Torn and damaged ones are passed over with a warning.

    Raises:
        StorageError: the storage cannot be read. CheckpointError: the checkpoint holds another
            model.
    """
    known = comms.gather_objects(
        _attempted(lambda: checkpoint.names(folder)) if comms.rank == 0 else None
    )[0]
    for name in _unless_error(known):
        mine = _attempted(lambda n=name: _taken(folder, n, model, optimizer))
        problems = [
            e
            for e in comms.gather_objects(mine if isinstance(mine, GrapeRayError) else None)
            if e is not None
        ]
        for problem in problems:
            if not isinstance(problem, CheckpointError):
                raise problem
        if problems:
            checkpoint.pass_over(problems[0])
            continue
        found: Checkpoint = _unless_error(mine)
        if sharding.is_sharded(model):
            return found, None
        coordinates = checkpoint.restore(model, found, subspace)
        optimizer.load_state_dict(found.optimizer)
        return found, coordinates
    return None


def _taken(folder: Storage, name: str, model: nn.Module, optimizer: Optimizer) -> Checkpoint:
    """A checkpoint, verified; a sharded model has taken up its rows by then, and no rank holds the
    whole.
    """
    if not sharding.is_sharded(model):
        return checkpoint.load(folder, name)
    reader = checkpoint.Reader(folder, name)
    rank_state.restore_rows(reader, model, optimizer)
    return Checkpoint(reader.manifest.step, name, reader.manifest.facts, {}, {})


def _attempted(call: Callable[[], Any]) -> Any:
    """The result, or the error, which is to be shared with the other ranks before it is raised."""
    try:
        return call()
    except GrapeRayError as error:
        return error


def _unless_error(value: Any) -> Any:
    if isinstance(value, GrapeRayError):
        raise value
    return value
