"""One rank's part of a run: set up, resume, take a new attempt's keys, train, and say how it
ended.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from grape_ray import checkpoint
from grape_ray.checkpoint import Coordinates
from grape_ray.checkpoint.manager import Occasion, Saver, resume
from grape_ray.config.trust import words_for
from grape_ray.distributed import sharding
from grape_ray.distributed.comms import Comms
from grape_ray.engines import Engine
from grape_ray.engines.engine import PerExampleLoss
from grape_ray.errors import CheckpointError, DataError, Interrupted, LedgerError, StorageError
from grape_ray.ledger.audit import verify
from grape_ray.optim import Optimizer, make_optimizer
from grape_ray.privacy.noise import NoiseStream
from grape_ray.privacy.redaction import is_ours, told, where
from grape_ray.storage import Storage
from grape_ray.tasks.task import Data, Task, loss_of
from grape_ray.training.build import build_engine, public_key
from grape_ray.training.journal import Journal
from grape_ray.training.loop import Notice, Outcome, Progress, run_loop
from grape_ray.training.plan import RESULT_FILE, Plan
from grape_ray.training.session import Around, Attempt, Session, begin_attempt
from grape_ray.training.step import Step


def execute(
    plan: Plan,
    comms: Comms,
    *,
    device: torch.device | None = None,
    on_progress: Callable[[Progress, float | None], None] | None = None,
    on_checkpoint: Callable[[str, Mapping[str, Any]], None] | None = None,
    on_notice: Callable[[Notice], Notice] = lambda own: own,
    on_figures: Callable[[Mapping[str, float]], None] = lambda figures: None,
    begin: Callable[[Plan, Comms], Attempt] | None = None,
    around: Around | None = None,
) -> dict[str, Any]:
    """Runs or resumes a planned run on this rank, as a new attempt; every rank calls it and gets
    the result.

    Args:
        device: where the model lives; CPU if None.
        on_progress, on_notice, on_figures: see Session; without on_progress it is kept in a file of
            the run's folder.
        on_checkpoint: told (name, facts) of each committed checkpoint, on every rank.
        begin: how an attempt gets its keys. around: what a sweep puts around the run.

    Raises:
        Interrupted: a notice ended the run, after a checkpoint.
        TaskFailed: the task's own code failed; where all records are public its exception is raised
            as it is.
        GrapeRayError: the data changed, the ledger was rolled back or cannot be reached, or storage
            fails.
    """
    return told(
        lambda: _execute(
            plan,
            comms,
            device or torch.device("cpu"),
            on_progress,
            on_checkpoint,
            on_notice,
            on_figures,
            begin,
            around or Around(),
        ),
        plan.public,
    )


def _execute(
    plan: Plan,
    comms: Comms,
    device: torch.device,
    on_progress: Callable[[Progress, float | None], None] | None,
    on_checkpoint: Callable[[str, Mapping[str, Any]], None] | None,
    on_notice: Callable[[Notice], Notice],
    on_figures: Callable[[Mapping[str, float]], None],
    begin: Callable[[Plan, Comms], Attempt] | None,
    around: Around,
) -> dict[str, Any]:
    """See `execute`."""
    began = time.monotonic()
    config, folder = plan.config, plan.folder()
    if config.performance.threads_per_worker:
        torch.set_num_threads(config.performance.threads_per_worker)
    data = config.task.load()
    if data.dataset_id != plan.dataset_id:
        expected = "the records that the run was planned with"
        raise DataError(
            "the training data changed", None, expected, "every worker must see the same data"
        )
    model, engine, loss = _model_and_engine(plan, data, device)
    optimizer = make_optimizer(
        model, engine, config.method, config.privacy.steps, public_key(config, "rounding")
    )
    start, earlier, newest, coordinates = _resume(plan, comms, folder, model, optimizer)
    attempt = begin(plan, comms) if begin else begin_attempt(plan, comms, around.open_ledger)
    if attempt.probe_key:
        engine.use_secret(attempt.probe_key, comms.rank)
    step = Step(
        task=config.task, loss=loss, model=model, engine=engine, optimizer=optimizer,
        records=data.train, comms=comms, device=device,
        noise=NoiseStream(attempt.noise_key) if attempt.noise_key else None,
        noise_multiplier=plan.noise_multiplier, sampling_prob=plan.sampling_prob,
        expected_batch_size=config.privacy.expected_batch_size, sampling_key=attempt.sampling_key,
        dropout_key=attempt.dropout_key, micro_batch_size=config.performance.micro_batch_size,
    )  # fmt: skip
    saver = Saver(config, comms, folder, model, optimizer, attempt.number)
    saver.newest = newest
    saver.resumed(coordinates)
    journal = Journal(folder, saver.attempt, comms.rank)
    journal.note(
        "begun",
        run=plan.run,
        step=start,
        world_size=comms.world_size,
        method=config.method.name,
        resumed_from=newest,
    )
    session = Session(
        plan, comms, attempt, data, model, optimizer, folder, saver, journal, earlier,
        on_progress or journal.progress, on_notice, on_figures, around,
    )  # fmt: skip
    saver.listeners += [session.committed, *([on_checkpoint] if on_checkpoint else [])]

    def take(number: int) -> None:
        if comms.rank == 0:
            around.on_step(number)
        step(number)

    try:
        outcome = run_loop(take, session, config.performance, start, config.privacy.steps, comms)
        saver.settle()
        # the last is made before its metrics
        if (
            on_checkpoint
            and outcome.progress.metrics_step == outcome.progress.step
            and saver.newest
        ):
            on_checkpoint(
                saver.newest, {"step": outcome.progress.step, "metrics": outcome.progress.metrics}
            )
        journal.note(
            "ended",
            step=outcome.progress.step,
            exhausted=outcome.exhausted,
            interrupted=outcome.interrupted,
        )
    except Exception as error:
        # another's text may quote a record
        plain = isinstance(error, (CheckpointError, LedgerError, StorageError)) and is_ours(error)
        journal.note(
            "failed",
            error=type(error).__name__,
            reason=str(error) if plain else None,
            where=where(error),
        )
        saver.linger()
        raise
    finally:
        journal.close()
        around.on_end()
    if outcome.interrupted:
        if comms.rank == 0:
            _settle(session, outcome.paid_until - outcome.progress.step)
        raise interrupted(plan, outcome.progress.step)
    return _conclude(session, outcome, time.monotonic() - began)


def interrupted(plan: Plan, step: int) -> Interrupted:
    """The end of a run that was told to end, with the words that go on with it."""
    fix = (
        f"run `grape-ray resume {plan.folder().url}{words_for(type(plan.config.task).__module__)}`"
        " to go on"
    )
    return Interrupted(f"run {plan.run} was told to end, and is kept at step {step}", None, "", fix)


def _model_and_engine(
    plan: Plan, data: Data, device: torch.device
) -> tuple[torch.nn.Module, Engine, PerExampleLoss]:
    """The model on its device, whole or this rank's shards of it, its engine, and the loss in the
    precision that was asked for.

    A sharded model's engine learns how parameters are used before they are spread, from the
    shortest and the longest records.
    """
    config, performance = plan.config, plan.config.performance
    task: Task = config.task
    model = task.build_model(config.seed)
    if not performance.sharded:
        if performance.recompute:
            sharding.recompute_blocks(model)
        model = model.to(device)
        return model, build_engine(config, model), loss_of(task, performance.precision, device.type)
    trial = build_engine(config, model)
    order = data.train.by_length(np.arange(len(data.train)))
    layouts = trial.learn(
        task.per_example_loss, task.collate(data.train, np.unique(order[[0, -1]]))
    )
    sharding.shard(
        model,
        device,
        torch.bfloat16 if performance.precision == "bf16" else None,
        performance.recompute,
    )
    engine = build_engine(config, model)
    engine.adopt(layouts)
    return model, engine, task.per_example_loss


def _resume(
    plan: Plan, comms: Comms, folder: Storage, model: torch.nn.Module, optimizer: Optimizer
) -> tuple[int, int, str, Coordinates | None]:
    """Restores the newest whole checkpoint; returns (its step, steps executed until then, its name,
    a delta's coordinates).
    """
    newest = resume(folder, comms, model, optimizer, optimizer.subspace)
    if newest is None:
        return (
            (0, 0, "", None)
            if plan.origin is None
            else _begin_from(plan, comms, folder, model, optimizer)
        )
    found, coordinates = newest
    head = found.facts["ledger_head"]
    if comms.rank == 0 and plan.ledger is not None and head is not None:
        report = verify(plan.ledger_storage(), head)
        if not report.ok:
            raise LedgerError(
                f"the ledger {plan.ledger} is not the one that this run was charged to",
                report.problems[0],
                "its own ledger",
                "restore it",
            )
    return found.step, int(found.facts["executed_steps"]), found.name, coordinates


def _begin_from(
    plan: Plan, comms: Comms, folder: Storage, model: torch.nn.Module, optimizer: Optimizer
) -> tuple[int, int, str, Coordinates | None]:
    """Takes over the checkpoint of another run, and keeps it as this run's own first; the result is
    that of `_resume`.
    """
    assert plan.origin is not None
    place = Storage(plan.origin[0], folder.deadline_s)
    found = checkpoint.load(place, checkpoint.of_step(place, checkpoint.step_of(plan.origin[1])))
    checkpoint.restore(model, found, optimizer.subspace)
    optimizer.load_state_dict(found.optimizer)
    saver = Saver(plan.config, comms, folder, model, optimizer, 0)
    saver.save(
        found.step,
        {**found.facts, "run": plan.run, "attempt": 0, "executed_steps": 0},
        Occasion.LAST,
    )
    return found.step, 0, saver.newest, None


def _settle(session: Session, unused: int) -> None:
    """Ends the attempt; steps that were paid for and never started are given back."""
    book, plan, number = session.ledger, session.plan, session.attempt.number
    if book is not None and unused:
        book.refund(plan.study, plan.run, number, session.chunk - 1, unused)
    elif plan.ledger is not None:
        (book or session.around.open_ledger(plan)).close_attempt(plan.study, plan.run, number)


def _conclude(session: Session, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """The result, on every rank, and durable in the run's folder; the attempt is closed."""
    plan, progress = session.plan, outcome.progress
    peaks = session.comms.gather_objects(_peak_bytes())
    result: dict[str, Any] = {}
    if session.comms.rank == 0:
        ledger, charged, attempts = session.ledger, 0, 0
        if plan.ledger is not None:
            _settle(session, outcome.paid_until - progress.step)
            ledger = ledger or session.around.open_ledger(plan)
            tries = ledger.attempts(plan.study, plan.run)
            charged, attempts = sum(t.used for t in tries), len(tries)
        result = {
            "run": plan.run,
            "method": plan.config.method.name,
            "private": plan.private,
            "epsilon": plan.promise[0] if plan.promise else None,
            "epsilon_spent": ledger.epsilon_spent(plan.study) if ledger else None,
            "delta": plan.promise[1] if plan.promise else None,
            "steps": progress.step,
            "noise_multiplier": plan.noise_multiplier if ledger else None,
            "metrics": dict(progress.metrics),
            "metrics_step": progress.metrics_step,
            "problems": session.problems,
            "seconds": round(seconds, 3),
            "peak_bytes": max(peaks),
            "checkpoint": f"{session.folder.url}/{session.saver.newest}",
            "ledger": plan.ledger,
            "exhausted": outcome.exhausted,
            "stopped": outcome.stopped,
            "diverged": list(progress.diverged),
            "executed_steps": session.earlier_steps + progress.executed,
            "charged_steps": charged,
            "attempts": attempts,
            "steps_per_s": round(progress.steps_per_s, 3),
            "workers": session.comms.world_size if plan.config.performance.num_workers else 0,
        }
        session.folder.write(RESULT_FILE, json.dumps(result, indent=1, sort_keys=True).encode())
    return session.comms.broadcast_object(result)


def _peak_bytes() -> int:
    """This process's peak: device memory where there is a device in use, otherwise resident
    memory.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
