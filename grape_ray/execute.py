"""One rank's part of a run: set up, resume, take a new attempt's keys, train, and say how it ended."""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from grape_ray import checkpoint, sharding
from grape_ray.accounting import keys
from grape_ray.accounting.ledger import Ledger
from grape_ray.accounting.verify import verify
from grape_ray.comms import Comms
from grape_ray.engines import Engine
from grape_ray.engines.base import PerExampleLoss
from grape_ray.errors import DataError, LedgerError
from grape_ray.loop import Outcome, Progress, run_loop
from grape_ray.noise import NoiseStream
from grape_ray.optim import Optimizer, make_optimizer
from grape_ray.plan import PROGRESS_FILE, RESULT_FILE, Plan, build_engine, public_key
from grape_ray.step import Step
from grape_ray.storage import Storage
from grape_ray.task import Data, Task, under_autocast

_PROGRESS_EVERY_S = 1.0


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run: its number in the ledger, and its secret streams.

    Attributes:
        number: from 1; 0 for the yardstick, which draws no noise.
        sampling_key, noise_key, probe_key: 32 bytes each; never written anywhere. The yardstick has only the first, and it is public.
    """

    number: int
    sampling_key: bytes = field(repr=False)
    noise_key: bytes | None = field(repr=False, default=None)
    probe_key: bytes | None = field(repr=False, default=None)


def begin_attempt(plan: Plan, comms: Comms) -> Attempt:
    """A new attempt: the number is durable in the ledger before the keys are derived, so no attempt shares a key with another."""
    if plan.ledger is None:
        return Attempt(0, public_key(plan.config, "sampling"))
    attempt = None
    if comms.rank == 0:
        ledger = Ledger.open(plan.ledger, plan.dataset_id, create=False)
        master = keys.master_key(plan.key_path)
        number = ledger.begin_attempt(plan.study, plan.run, keys.key_id(master))
        labels = (ledger.ledger_id, plan.study, plan.run, number)
        attempt = Attempt(number, *(keys.derive(master, *labels, stream) for stream in ("sampling", "noise", "probes")))
    return comms.broadcast_object(attempt)


@dataclass
class Session:
    """The hooks of a run's loop on one rank.

    Attributes:
        earlier_steps: executed before this attempt, as far as is known. newest: name of the newest checkpoint.
        on_progress: told (progress, epsilon spent or None), on rank 0. on_checkpoint: told (name, facts), on every rank.
    """

    plan: Plan
    comms: Comms
    attempt: Attempt
    data: Data
    model: torch.nn.Module
    optimizer: Optimizer
    folder: Storage
    earlier_steps: int
    on_progress: Callable[[Progress, float | None], None]
    on_checkpoint: Callable[[str, Mapping[str, Any]], None]
    newest: str
    ledger: Ledger | None = None
    chunk: int = 0
    epsilon: float | None = None

    def reserve(self, step: int, count: int) -> int:
        if self.plan.ledger is None:
            return count
        if self.ledger is None:
            self.ledger = Ledger.open(self.plan.ledger, self.plan.dataset_id, create=False)
        granted = self.ledger.charge(self.plan.study, self.plan.run, self.attempt.number, self.chunk, count, first_step=step).steps
        self.chunk += 1
        self.epsilon = self.ledger.epsilon_spent(self.plan.study)
        return granted

    @property
    def evaluates_together(self) -> bool:
        return sharding.is_sharded(self.model)

    def evaluate(self) -> dict[str, float]:
        task: Task = self.plan.config.task
        return task.evaluate(self.model, self.data.validation)

    def checkpoint(self, progress: Progress) -> None:
        self.newest = checkpoint.folder_of(progress.step)
        facts = {
            "run": self.plan.run,
            "step": progress.step,
            "attempt": self.attempt.number,
            "ledger_head": self.ledger.head if self.ledger else None,
            "executed_steps": self.earlier_steps + progress.executed,
            "metrics": dict(progress.metrics),
        }
        if self.comms.rank == 0:
            checkpoint.save(self.folder, progress.step, self.model, self.optimizer.state_dict(), facts)
        self.comms.barrier()
        self.on_checkpoint(self.newest, facts)
        if self.comms.rank == 0:
            checkpoint.retain(self.folder, self.plan.config.performance.keep_checkpoints)

    def progressed(self, progress: Progress) -> None:
        self.on_progress(progress, self.epsilon)


def execute(
    plan: Plan,
    comms: Comms,
    *,
    device: torch.device | None = None,
    on_progress: Callable[[Progress, float | None], None] | None = None,
    on_checkpoint: Callable[[str, Mapping[str, Any]], None] | None = None,
    begin: Callable[[Plan, Comms], Attempt] = begin_attempt,
) -> dict[str, Any]:
    """Runs or resumes a planned run on this rank, as a new attempt; every rank calls it and gets the result.

    Args:
        device: where the model lives; CPU if None.
        on_progress, on_checkpoint: see Session. begin: how an attempt gets its keys.

    Raises:
        GrapeRayError: the data changed, the ledger was rolled back or cannot be reached, or storage fails.
    """
    began = time.monotonic()
    config, folder = plan.config, plan.folder()
    if config.performance.threads_per_worker:
        torch.set_num_threads(config.performance.threads_per_worker)
    device = device or torch.device("cpu")
    data = config.task.load()
    if data.dataset_id != plan.dataset_id:
        raise DataError("the training data changed", data.dataset_id, plan.dataset_id, "every worker must see the same data")
    model, engine, loss = _model_and_engine(plan, data, device)
    optimizer = make_optimizer(model, engine, config.method, config.privacy.steps, public_key(config, "rounding"))
    start, earlier = _resume(plan, comms, folder, model, optimizer)
    attempt = begin(plan, comms)
    if attempt.probe_key:
        engine.use_secret(attempt.probe_key, comms.rank)
    step = Step(
        task=config.task, loss=loss, model=model, engine=engine, optimizer=optimizer, records=data.train, comms=comms, device=device,
        noise=NoiseStream(attempt.noise_key) if attempt.noise_key else None, noise_multiplier=plan.noise_multiplier,
        sampling_prob=plan.sampling_prob, expected_batch_size=config.privacy.expected_batch_size, sampling_key=attempt.sampling_key,
        dropout_key=public_key(config, "dropout"), micro_batch_size=config.performance.micro_batch_size,
    )  # fmt: skip
    session = Session(
        plan, comms, attempt, data, model, optimizer, folder, earlier,
        on_progress or ProgressFile(folder), on_checkpoint or (lambda name, facts: None), checkpoint.folder_of(start),
    )  # fmt: skip
    outcome = run_loop(step, session, config.performance, start, config.privacy.steps, comms)
    return _conclude(session, outcome, time.monotonic() - began)


def _model_and_engine(plan: Plan, data: Data, device: torch.device) -> tuple[torch.nn.Module, Engine, PerExampleLoss]:
    """The model on its device, whole or this rank's shards of it, its engine, and the loss in the precision that was asked for.

    A sharded model's engine learns how parameters are used before they are spread, from the shortest and the longest records.
    """
    config, performance = plan.config, plan.config.performance
    task: Task = config.task
    model, low = task.build_model(config.seed), performance.precision == "bf16"
    if not performance.sharded:
        if performance.recompute:
            sharding.recompute_blocks(model)
        model = model.to(device)
        loss = under_autocast(task.per_example_loss, device.type) if low else task.per_example_loss
        return model, build_engine(config, model), loss
    trial = build_engine(config, model)
    order = data.train.by_length(np.arange(len(data.train)))
    layouts = trial.learn(task.per_example_loss, task.collate(data.train, np.unique(order[[0, -1]])))
    sharding.shard(model, device, torch.bfloat16 if low else None, performance.recompute)
    engine = build_engine(config, model)
    engine.adopt(layouts)
    return model, engine, task.per_example_loss


def _resume(plan: Plan, comms: Comms, folder: Storage, model: torch.nn.Module, optimizer: Optimizer) -> tuple[int, int]:
    """Restores the newest whole checkpoint, the same on every rank; returns (its step, steps executed until then)."""
    name = None
    if comms.rank == 0:
        newest = checkpoint.latest(folder)
        name = newest.name if newest else None
    name = comms.broadcast_object(name)
    if name is None:
        return 0, 0
    found = checkpoint.load(folder, name)
    head = found.facts["ledger_head"]
    if comms.rank == 0 and plan.ledger is not None and head is not None:
        report = verify(plan.ledger, head)
        if not report.ok:
            raise LedgerError(f"the ledger {plan.ledger} is not the one that this run was charged to", report.problems[0], "", "restore it")
    checkpoint.restore(model, found.model)
    optimizer.load_state_dict(found.optimizer)
    return found.step, int(found.facts["executed_steps"])


def _conclude(session: Session, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """The result, on every rank, and durable in the run's folder; the attempt is closed."""
    plan, progress = session.plan, outcome.progress
    peaks = session.comms.gather_objects(_peak_bytes())
    result: dict[str, Any] = {}
    if session.comms.rank == 0:
        ledger, charged, attempts = session.ledger, 0, 0
        if plan.ledger is not None:
            ledger = ledger or Ledger.open(plan.ledger, plan.dataset_id, create=False)
            ledger.close_attempt(plan.study, plan.run, session.attempt.number)
            tries = ledger.state.study(plan.study).runs[plan.run]
            charged, attempts = sum(t.used for t in tries), len(tries)
        result = {
            "run": plan.run,
            "method": plan.config.method.name,
            "epsilon": ledger.epsilon_spent(plan.study) if ledger else None,
            "delta": plan.config.privacy.delta if ledger else None,
            "steps": progress.step,
            "noise_multiplier": plan.noise_multiplier if ledger else None,
            "metrics": dict(progress.metrics),
            "seconds": round(seconds, 3),
            "peak_bytes": max(peaks),
            "checkpoint": f"{session.folder.url}/{session.newest}",
            "ledger": plan.ledger,
            "exhausted": outcome.exhausted,
            "executed_steps": session.earlier_steps + progress.executed,
            "charged_steps": charged,
            "attempts": attempts,
            "steps_per_s": round(progress.steps_per_s, 3),
            "workers": plan.config.performance.num_workers,
        }
        session.folder.write(RESULT_FILE, json.dumps(result, indent=1, sort_keys=True).encode())
    return session.comms.broadcast_object(result)


def _peak_bytes() -> int:
    """This process's peak: device memory where there is a device in use, otherwise resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class ProgressFile:
    """Keeps a run's progress in a small file of its folder, once a second and with fresh metrics, for who watches from elsewhere."""

    def __init__(self, folder: Storage):
        self._folder, self._next_s = folder, 0.0

    def __call__(self, progress: Progress, epsilon: float | None) -> None:
        now = time.monotonic()
        if now >= self._next_s or progress.metrics_step == progress.step:
            self._next_s = now + _PROGRESS_EVERY_S
            self._folder.write(PROGRESS_FILE, json.dumps({**dataclasses.asdict(progress), "epsilon": epsilon}).encode())
