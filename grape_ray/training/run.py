"""One rank's part of a run: set up, restore, begin an attempt, train, and say how it ended."""

from __future__ import annotations

import resource
import time
from functools import partial

import numpy as np
import torch

from grape_ray.checkpoint.manager import CheckpointManager, Restored
from grape_ray.config.description import named_modules
from grape_ray.config.trust import words_for
from grape_ray.distributed import sharding
from grape_ray.distributed.comms import Comms
from grape_ray.engines import Engine
from grape_ray.engines.engine import PerExampleLoss
from grape_ray.errors import CheckpointError, DataError, Interrupted, LedgerError, StorageError
from grape_ray.ledger.audit import verify
from grape_ray.ledger.interface import LedgerClient
from grape_ray.optim import make_optimizer
from grape_ray.privacy.noise import NoiseStream
from grape_ray.privacy.rank_zero import on_rank_zero
from grape_ray.privacy.redaction import is_ours, run_redacted, where
from grape_ray.storage import Storage
from grape_ray.tasks.task import Data, Task, load, loss_of
from grape_ray.training.active_run import ActiveRun
from grape_ray.training.build import build_engine, build_model, public_key
from grape_ray.training.callbacks import RunCallbacks
from grape_ray.training.frozen_features import on_features
from grape_ray.training.journal import Journal
from grape_ray.training.loop import run_loop
from grape_ray.training.plan import Plan
from grape_ray.training.progress import Outcome
from grape_ray.training.result import RunResult
from grape_ray.training.step import Step

_LEARNED_FROM = 5  # records between the extremes, from which a sharded model's layouts are learned


def execute(
    plan: Plan,
    comms: Comms,
    callbacks: RunCallbacks = RunCallbacks(),  # noqa: B008  (frozen)
    device: torch.device | None = None,
) -> RunResult:
    """Runs or resumes a planned run on this rank, as a new attempt; every rank calls it and gets
    the result.

    Args:
        device: where the model lives; None is this process's GPU if `performance.use_gpu`, and else
            the CPU.

    Raises:
        Interrupted: a signal ended the run, after a checkpoint.
        TaskFailed: the task's own code failed; where all records are public its exception is raised
            as it is.
        GrapeRayError: the data changed, the ledger was rolled back or cannot be reached, or storage
            fails.
    """
    place = device or torch.device("cuda" if plan.config.performance.use_gpu else "cpu")
    return run_redacted(lambda: _execute(plan, comms, callbacks, place), plan.public)


def _execute(plan: Plan, comms: Comms, callbacks: RunCallbacks, device: torch.device) -> RunResult:
    began = time.monotonic()
    config, performance = plan.config, plan.config.performance
    if performance.threads_per_worker:
        torch.set_num_threads(performance.threads_per_worker)
    data = _loaded(plan)
    model, engine, task, loss = _what_is_trained(plan, data, device)
    optimizer = make_optimizer(
        model, engine, config.method, config.privacy.steps, public_key(config, "rounding")
    )
    checkpoints = CheckpointManager(config, comms, plan.folder(), model, optimizer)
    restored = _restored(plan, comms, checkpoints)
    ledger = _opened_ledger(plan, comms, callbacks)
    attempt = callbacks.begin_attempt(plan, comms, ledger)
    if attempt.probe_key:
        engine.use_secret(attempt.probe_key, comms.rank)
    step = Step(
        task=task,
        loss=loss,
        model=model,
        engine=engine,
        optimizer=optimizer,
        records=data.train,
        comms=comms,
        device=device,
        noise=NoiseStream(attempt.noise_key) if attempt.noise_key else None,
        sampling_prob=plan.sampling_prob,
        expected_batch_size=config.privacy.expected_batch_size,
        sampling_key=attempt.sampling_key,
        dropout_key=attempt.dropout_key,
        micro_batch_size=performance.micro_batch_size,
        units=data.units,
        examples_per_unit=config.privacy.examples_per_unit,
    )
    checkpoints.begin_attempt(attempt.number)
    journal = Journal(plan.folder(), checkpoints.attempt, comms.rank)
    journal.note(
        "begun",
        run=plan.run,
        step=restored.step,
        world_size=comms.world_size,
        method=config.method.name,
        resumed_from=restored.name,
    )
    run = ActiveRun(
        plan,
        comms,
        callbacks,
        attempt,
        data,
        task,
        model,
        checkpoints,
        journal,
        earlier_steps=restored.executed_steps,
        ledger=ledger,
    )
    checkpoints.on_commit = run.committed
    outcome = _train(run, step, restored.step)
    if outcome.interrupted:
        if comms.rank == 0:
            run.close_attempt(outcome.paid_until - outcome.progress.step)
        raise interrupted(plan, outcome.progress.step)
    return _conclude(run, outcome, time.monotonic() - began)


def _loaded(plan: Plan) -> Data:
    """The records. Raises DataError where they are not those that the run was planned with."""
    data = load(plan.config.task, plan.config.privacy.unit)
    if data.dataset_id != plan.dataset_id or data.unit_count != plan.units:
        expected = "the records that the run was planned with"
        raise DataError(
            "the training data changed", None, expected, "every worker must see the same data"
        )
    return data


def _opened_ledger(plan: Plan, comms: Comms, callbacks: RunCallbacks) -> LedgerClient | None:
    """The ledger, on rank 0 alone; what keeps it from being opened is raised on every rank."""
    held: list[LedgerClient] = []
    if plan.ledger is not None:
        on_rank_zero(comms, lambda: held.append(callbacks.open_ledger(plan)))
    return held[0] if held else None


def _train(run: ActiveRun, step: Step, start: int) -> Outcome:
    """The loop, to its end or its failure; both are noted in the journal."""
    config, callbacks, journal = run.plan.config, run.callbacks, run.journal

    def take(number: int) -> None:
        if run.comms.rank == 0:
            callbacks.on_step(number)
        step(number, run.grant)

    try:
        outcome = run_loop(take, run, config.performance, start, config.privacy.steps)
        progress, checkpoints = outcome.progress, run.checkpoints
        checkpoints.flush()
        # The last checkpoint is made before its metrics are known.
        if progress.metrics_step == progress.step and checkpoints.newest:
            metadata = {"step": progress.step, "metrics": progress.metrics}
            callbacks.on_checkpoint(checkpoints.newest, metadata)
        journal.note(
            "ended",
            step=progress.step,
            exhausted=outcome.exhausted,
            interrupted=outcome.interrupted,
        )
        return outcome
    except Exception as error:
        # Of another's error the text may quote a record.
        known = isinstance(error, (CheckpointError, LedgerError, StorageError)) and is_ours(error)
        reason = str(error) if known else None
        journal.note("failed", error=type(error).__name__, reason=reason, where=where(error))
        run.checkpoints.drain()
        raise
    finally:
        journal.close()
        callbacks.on_end()


def interrupted(plan: Plan, step: int) -> Interrupted:
    """The end of a run that was interrupted, with the command that resumes it."""
    resume = f"grape-ray resume {plan.folder().url}{words_for(named_modules(plan.config.task))}"
    return Interrupted(
        f"run {plan.run} was interrupted, and is kept at step {step}",
        None,
        "",
        f"run `{resume}` to go on",
    )


def _what_is_trained(
    plan: Plan, data: Data, device: torch.device
) -> tuple[torch.nn.Module, Engine, Task, PerExampleLoss]:
    """The model on its device, whole or this rank's shards of it, its engine, the task as steps and
    evaluations see it, and its loss in the precision that was asked for.

    A sharded model's engine learns how parameters are used before they are sharded, from the
    shortest and the longest records.
    """
    config, performance = plan.config, plan.config.performance
    task: Task = config.task
    model = build_model(config, device.type)
    if not performance.sharded:
        if performance.recompute:
            sharding.recompute_blocks(model)
        model = model.to(device)
        task = on_features(task, model, data, half=performance.precision == "bf16")
        loss = loss_of(task, performance.precision, device.type)
        return model, build_engine(config, model), task, loss
    whole = build_engine(config, model)
    # Between the extremes, too: of two records alone, a batch's rows can be read in two ways.
    spread = np.linspace(0, len(data.train) - 1, _LEARNED_FROM).astype(np.int64)
    some = np.unique([*data.train.extremes(), *spread.tolist()])
    layouts = whole.learn(task.per_example_loss, task.collate(data.train, some))
    half = torch.bfloat16 if performance.precision == "bf16" else None
    sharding.shard(model, device, half, performance.recompute)
    engine = build_engine(config, model)
    engine.adopt(layouts)
    return model, engine, task, task.per_example_loss


def _restored(plan: Plan, comms: Comms, checkpoints: CheckpointManager) -> Restored:
    """What the run resumes from: its newest whole checkpoint, that of the run it begins from, or
    nothing.

    Raises:
        LedgerError: the ledger holds less than it did when the checkpoint was made.
    """
    restored = checkpoints.restore()
    if restored.name == "" and plan.origin is not None:
        folder, name = plan.origin
        origin = Storage(folder, plan.config.performance.storage_timeout_s)
        own = {"run": plan.run, "attempt": 0, "executed_steps": 0}
        return checkpoints.begin_from(origin, name, own)
    head = restored.metadata.get("ledger_head")
    if plan.ledger is not None and head is not None:
        on_rank_zero(comms, partial(_check_ledger, plan, head))
    return restored


def _check_ledger(plan: Plan, head: str) -> None:
    """Refuses a ledger that was cut off or replaced since its last entry had the hash `head`."""
    report = verify(plan.ledger_storage(), head)
    if not report.ok:
        raise LedgerError(
            f"the ledger {plan.ledger} is not the one that this run was charged to",
            report.problems[0],
            "its own ledger",
            "restore it",
        )


def _conclude(run: ActiveRun, outcome: Outcome, seconds: float) -> RunResult:
    """The result, on every rank, and durable in the run's folder; the attempt is closed."""
    peaks = run.comms.gather_objects(_peak_bytes())
    result = None
    if run.comms.rank == 0:
        result = _result(run, outcome, seconds, max(peaks))
        result.save(run.plan.folder())
    return run.comms.broadcast_object(result)


def _result(run: ActiveRun, outcome: Outcome, seconds: float, peak_bytes: int) -> RunResult:
    plan, progress = run.plan, outcome.progress
    epsilon, delta = plan.target or (None, None)
    charged, attempts = 0, 0
    if plan.ledger is not None:
        run.close_attempt(outcome.paid_until - progress.step)
        assert run.ledger is not None
        each = run.ledger.attempts(plan.study, plan.run)
        charged, attempts = sum(one.used for one in each), len(each)
    return RunResult(
        run=plan.run,
        method=plan.config.method.name,
        private=plan.private,
        epsilon=epsilon,
        epsilon_spent=run.ledger.epsilon_spent(plan.study) if run.ledger else None,
        delta=delta,
        steps=progress.step,
        noise_multiplier=plan.noise_multiplier if run.ledger else None,
        unit=plan.config.privacy.unit_name,
        examples_per_unit=plan.config.privacy.unit_limit,
        metrics=dict(progress.metrics),
        metrics_step=progress.metrics_step,
        problems=run.problems,
        seconds=round(seconds, 3),
        peak_bytes=peak_bytes,
        checkpoint=f"{plan.folder().url}/{run.checkpoints.newest}",
        ledger=plan.ledger,
        exhausted=outcome.exhausted,
        stopped=outcome.stopped,
        diverged=list(progress.diverged),
        executed_steps=run.earlier_steps + progress.executed,
        charged_steps=charged,
        attempts=attempts,
        steps_per_s=round(progress.steps_per_s, 3),
        workers=run.comms.world_size if plan.config.performance.num_workers else 0,
    )


def _peak_bytes() -> int:
    """This process's peak: device memory where a GPU is in use, otherwise resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
