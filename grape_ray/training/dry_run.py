"""Everything that a run will do, done once and thrown away before anything is paid for: so that
nothing can fail late.

The description is written and read back, a clipped sum is taken over the shortest and the longest
records of all, validation records are evaluated, a checkpoint goes to the run's own storage and
comes back, and the model is exported. No noise is drawn, and the model in that checkpoint has seen
no record: whatever interrupts a dry run, nothing unpaid for is left behind.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from grape_ray import checkpoint
from grape_ray.checkpoint.manager import CheckpointManager, Occasion
from grape_ray.config.description import check_description, describe
from grape_ray.config.schema import Config
from grape_ray.data.arrays import Records
from grape_ray.distributed.comms import Comms
from grape_ray.engines import Engine
from grape_ray.engines.capture.batches import Batch
from grape_ray.engines.capture.model_state import awake
from grape_ray.errors import (
    CheckpointError,
    ConfigError,
    GrapeRayError,
    StorageError,
    TaskFailed,
    nearest,
)
from grape_ray.optim import Optimizer, make_optimizer
from grape_ray.privacy.noise import grid_and_std, nonprivate_mean
from grape_ray.privacy.redaction import run_redacted
from grape_ray.storage import Storage
from grape_ray.tasks.metrics import plain
from grape_ray.tasks.task import Data, Task, loss_of, views_of
from grape_ray.training.build import build_engine, build_model, public_key
from grape_ray.training.preflight import Report, preflight

_VALIDATION_RECORDS = 8  # that a dry run evaluates
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class DryRun:
    """What a dry run has seen.

    Attributes:
        seconds: it took. report: the preflight's. checkpoint_bytes: of a full checkpoint. metrics:
            their names. norms: of the first gradients of the records that it took, before they
            are clipped; none unless all records are public.
    """

    seconds: float
    report: Report
    checkpoint_bytes: int
    metrics: tuple[str, ...]
    norms: tuple[float, ...] = ()


def dry_run(
    config: Config,
    data: Data,
    place: Storage,
    noise_multiplier: float,
    public: bool,
    metric: str | None = None,
) -> DryRun:
    """Does once what a run will do; nothing is kept, and nothing is left in `place`.

    Args:
        place: the folder of runs. noise_multiplier: of the steps; unused by method `none`.
        public: whether all records are public, so that errors of the task may quote them.
        metric: one that `evaluate` must give, as a sweep's score; None asks for no special one.

    Raises:
        GrapeRayError: one of its kinds for whatever would fail later.
    """
    began, task = time.monotonic(), config.task
    check_description(config)
    stage = partial(_stage, public)
    fix = (
        "a text that is longer than the model's positions needs a smaller task.max_tokens;"
        " otherwise correct the task"
    )
    model, batch, report = stage(
        "a step on the shortest and the longest training records",
        partial(preflight_extremes, config, data),
        fix,
    )
    engine = build_engine(config, model)
    optimizer = make_optimizer(
        model, engine, config.method, config.privacy.steps, public_key(config, "rounding")
    )
    norms = ()
    if not config.performance.sharded:
        norms = stage(
            "a private step",
            partial(_step, config, batch, model, engine, optimizer, noise_multiplier),
            fix,
        )
    names = stage(
        "the evaluation of validation records",
        partial(_evaluate, task, model, data.validation),
        "correct task.evaluate, or the records",
    )
    if metric is not None and metric not in names:
        raise ConfigError(
            "task.evaluate gives no such metric",
            metric,
            "one of " + ", ".join(names),
            nearest(metric, names),
        )
    with place.first_contact().scratch() as folder:
        size = _save_and_load(config, folder, model, optimizer)
    # one more than are kept: the next is whole before the oldest goes
    _check_room(place, size, config.performance.keep_checkpoints + 1)
    stage("the export of the model", partial(_export, task, model), "correct task.save")
    return DryRun(time.monotonic() - began, report, size, tuple(names), norms if public else ())


def _stage(public: bool, what: str, call: Callable[[], _Result], fix: str) -> _Result:
    """The result of `call`, which runs code of the task; what it raises becomes a TaskFailed that
    says where the dry run was.
    """
    try:
        return run_redacted(call, public)
    except TaskFailed as error:
        raise TaskFailed(
            f"dry run, {what}: {error.what}", error.got, "no error", f"{fix} ({error.fix})"
        ) from None
    except GrapeRayError:
        raise
    except Exception as error:
        raise TaskFailed(
            f"dry run, {what}", f"{type(error).__name__}: {error}", "no error", fix
        ) from error


def preflight_extremes(config: Config, data: Data) -> tuple[nn.Module, Batch, Report]:
    """The preflight on the extremes of all records, in the mode that trains; the model it built,
    the batch, and what it found.
    """
    model, batch, alone = _extremes(config, data)
    key, loss, views = (
        public_key(config, "projection"),
        config.task.per_example_loss,
        views_of(config.task),
    )
    # Views may be drawn anew for each batch: they are compared with rows of this one.
    singles, rows = ([] if views > 1 else alone), len(alone) * views
    report = preflight(model, loss, batch, config.privacy, config.method, key, rows, singles, views)
    return model, batch, report


def _extremes(config: Config, data: Data) -> tuple[nn.Module, Batch, list[Batch]]:
    """The task's model, a batch of the shortest, the longest and a random one of all records, and
    each of these as a batch of its own.
    """
    task: Task = config.task
    model = build_model(config, "cpu")
    # what is extreme in length is where memory, positions and padding fail
    picked = sorted({*data.train.extremes(), random.randrange(len(data.train))})
    return (
        model,
        task.collate(data.train, np.array(picked)),
        [task.collate(data.train, np.array([index])) for index in picked],
    )


def _step(
    config: Config,
    batch: Batch,
    model: nn.Module,
    engine: Engine,
    optimizer: Optimizer,
    noise_multiplier: float,
) -> tuple[float, ...]:
    """A clipped sum over the preflight's batch, in the run's own precision, and an update by no
    gradient at all; the norms of what was clipped, if the method knows them.

    The sum is dropped: what moves the model here goes to the run's storage, unpaid for, so no
    record and no noise may have a part in it.
    """
    with awake(model):
        loss = loss_of(config.task, config.performance.precision, "cpu")
        norms = engine.clipped_sum(loss, batch).unprotected.get("norms")
    if engine.private:
        grid_and_std(engine.clip_norm, noise_multiplier, engine.coordinates)
    optimizer.step(nonprivate_mean(engine.empty_sum(0), batch_size=1))
    return () if norms is None else tuple(norms.tolist())


def _evaluate(task: Task, model: nn.Module, records: Records) -> list[str]:
    """Names of the metrics of a few records, the shortest and the longest among them; of all, where
    a few have none.
    """
    if not len(records):
        return []
    order = records.by_length(np.arange(len(records)))
    spread = (
        np.linspace(0, len(order) - 1, min(_VALIDATION_RECORDS, len(order)))
        .round()
        .astype(np.int64)
    )
    try:
        return list(plain(task.evaluate(model, records.take(np.unique(order[spread])))))
    except Exception:
        # as a metric that needs every class among them
        return list(plain(task.evaluate(model, records)))


def _save_and_load(config: Config, folder: Storage, model: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of a checkpoint that was written and came back as it was."""
    saver = CheckpointManager(config, Comms.local(), folder, model, optimizer)
    saver.begin_attempt(1)
    saver.save(1, {"step": 1, "config": describe(config)}, Occasion.LAST)
    found = checkpoint.load(folder, saver.newest)
    state = {**model.state_dict(), **{name: p for name, p in model.named_parameters()}}
    changed = [name for name, tensor in found.model.items() if not _same(tensor, state[name])]
    if changed:
        raise CheckpointError(
            "a checkpoint of this model does not come back as it was",
            min(changed),
            "the same bits",
            "see its type",
        )
    checkpoint.restore(model, found, optimizer.subspace)
    optimizer.load_state_dict(found.optimizer)
    return sum(checkpoint.read_manifest(folder, saver.newest).files.values())


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    mine, theirs = (
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)
    )
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(mine, theirs)


def _check_room(place: Storage, size: int, count: int) -> None:
    """Refuses a local disk that has no room for the checkpoints of a run. Raises StorageError."""
    if not place.local:
        return
    folder = Path(place.url)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size * count:
        got = f"{free / 2**20:.0f} MiB free"
        expected = f"{size * count / 2**20:.0f} MiB, for {count} checkpoints"
        raise StorageError(
            f"{place.url} has no room for a run",
            got,
            expected,
            "free space, or choose another --storage",
        )


def _export(task: Task, model: nn.Module) -> None:
    """The model in a folder, as `grape-ray export` would write it; thrown away."""
    with tempfile.TemporaryDirectory(prefix="grape-ray-") as scratch:
        target = Path(scratch, "model")
        task.save(model, target)
        if not target.is_dir() or not os.listdir(target):
            raise ConfigError(
                "task.save wrote nothing",
                None,
                "a folder with the model's files",
                "write to the folder that it is given",
            )
