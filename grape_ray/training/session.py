"""What a run's loop has around it on one rank: its attempt and keys, what a sweep puts there, and
the hooks that the loop calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from grape_ray.checkpoint.manager import Occasion, Saver
from grape_ray.config.pipelines import describe
from grape_ray.data.fingerprints import fingerprint_records
from grape_ray.distributed import sharding
from grape_ray.distributed.comms import Comms
from grape_ray.ledger.interface import Book
from grape_ray.ledger.ledger import Ledger
from grape_ray.optim import Optimizer
from grape_ray.privacy import keys
from grape_ray.privacy.redaction import is_ours, where
from grape_ray.storage import Storage
from grape_ray.tasks.metrics import plain
from grape_ray.tasks.task import Data, Task
from grape_ray.training.build import public_key
from grape_ray.training.journal import Journal
from grape_ray.training.loop import Notice, Progress
from grape_ray.training.plan import Plan
from grape_ray.training.private_scores import PrivateScore


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run: its number in the ledger, and its secret streams.

    Attributes:
        number: from 1; 0 for the yardstick, which draws no noise.
        sampling_key, dropout_key, noise_key, probe_key: 32 bytes each; never written anywhere. The
            yardstick has only the first two, and they are public.
    """

    number: int
    sampling_key: bytes = field(repr=False)
    dropout_key: bytes = field(repr=False)
    noise_key: bytes | None = field(repr=False, default=None)
    probe_key: bytes | None = field(repr=False, default=None)


def open_ledger(plan: Plan) -> Book:
    """The ledger that a plan names."""
    assert plan.ledger is not None
    return Ledger.open(plan.ledger_storage(), plan.dataset_id, create=False)


def open_scores(plan: Plan) -> Book:
    """The ledger of the plan's private validation records."""
    assert plan.scores is not None
    return Ledger.open(
        Storage(plan.scores.ledger, plan.config.performance.storage_timeout_s), create=False
    )


def _always(progress: Progress) -> bool:
    return True


@dataclass(frozen=True)
class Around:
    """What stands around a run that is a trial of a sweep; by default nothing does.

    Attributes:
        open_ledger: gives the ledger to be charged; called on rank 0 alone.
        on_step: told the number of each step before it is taken, on rank 0.
        go_on: asked after each evaluation but the last, on rank 0, whether the run goes on; may
            wait as long as it likes.
        open_scores: gives the ledger of private validation records, called on rank 0 alone; whether
            they are private is the plan's.
        on_end: called when the loop is over, however it ended, on every rank.
    """

    open_ledger: Callable[[Plan], Book] = open_ledger
    on_step: Callable[[int], None] = lambda step: None
    go_on: Callable[[Progress], bool] = _always
    open_scores: Callable[[Plan], Book] = open_scores
    on_end: Callable[[], None] = lambda: None


def begin_attempt(
    plan: Plan, comms: Comms, open_ledger: Callable[[Plan], Book] = open_ledger
) -> Attempt:
    """A new attempt: the number is durable in the ledger before the keys are derived, so no attempt
    shares a key with another.

    Rank 0 derives them and tells the others: a part of them is fresh, so nobody can derive them
    again, from a copied ledger either.
    """
    if plan.ledger is None:
        return Attempt(0, public_key(plan.config, "sampling"), public_key(plan.config, "dropout"))
    attempt = None
    if comms.rank == 0:
        ledger = open_ledger(plan)
        master = keys.master_key(plan.key_path)
        number = ledger.begin_attempt(
            plan.study, plan.run, keys.key_id(master), dataset_id=plan.dataset_id
        )
        own = keys.of_attempt(master, ledger.ledger_id, plan.study, plan.run, number)
        attempt = Attempt(
            number,
            *(keys.derive(own, stream) for stream in ("sampling", "dropout", "noise", "probes")),
        )
    return comms.broadcast_object(attempt)


@dataclass
class Session:
    """The hooks of a run's loop on one rank.

    Attributes:
        earlier_steps: executed before this attempt, as far as is known. tokens_left: of a study
            that is the run's own.
        on_progress: told (progress, epsilon spent or None), on rank 0.
        on_notice: given what this rank asks for, what the world and all ranks ask for, the same on
            every rank.
        on_figures: told the figures of `orchestrate.gauges`, on rank 0.
        problems: what failed without ending the run, in lines for a person.
    """

    plan: Plan
    comms: Comms
    attempt: Attempt
    data: Data
    model: torch.nn.Module
    optimizer: Optimizer
    folder: Storage
    saver: Saver
    journal: Journal
    earlier_steps: int
    on_progress: Callable[[Progress, float | None], None]
    on_notice: Callable[[Notice], Notice]
    on_figures: Callable[[Mapping[str, float]], None]
    around: Around = field(default_factory=Around)
    ledger: Book | None = None
    chunk: int = 0
    epsilon: float | None = None
    tokens_left: int | None = None
    private_score: PrivateScore | None = None
    problems: list[str] = field(default_factory=list)
    _saved_s: float = field(default_factory=time.monotonic)

    def reserve(self, step: int, count: int) -> int:
        if self.plan.ledger is None:
            return count
        if self.ledger is None:
            self.ledger = self.around.open_ledger(self.plan)
            if self.plan.study == self.plan.run:
                self.tokens_left = self.plan.tokens - sum(
                    t.used for t in self.ledger.attempts(self.plan.study, self.plan.run)
                )
        plan, number, used = self.plan, self.attempt.number, self.data.dataset_id
        granted = self.ledger.charge(
            plan.study, plan.run, number, self.chunk, count, first_step=step, dataset_id=used
        ).steps
        self.chunk += 1
        self.epsilon = self.ledger.epsilon_spent(self.plan.study)
        self.tokens_left = None if self.tokens_left is None else self.tokens_left - granted
        self.journal.note(
            "charged",
            first_step=step,
            steps=granted,
            epsilon=self.epsilon,
            tokens_left=self.tokens_left,
        )
        return granted

    @property
    def evaluates_together(self) -> bool:
        return sharding.is_sharded(self.model)

    def evaluate(self) -> dict[str, float] | None:
        task: Task = self.plan.config.task
        try:
            return plain(task.evaluate(self.model, self.data.validation))
        except Exception as error:
            self._survive("an evaluation failed", error)
            return None

    def _survive(self, what: str, error: Exception) -> None:
        """Keeps what failed, once each; its text only where it cannot quote a record."""
        place, plain_text = where(error), self.plan.public or is_ours(error)
        told = f"{what}: {type(error).__name__}" + (
            f": {error}" if plain_text else f" at {place[-1] if place else 'an unknown place'}"
        )
        told = " ".join(told.split())
        self.journal.note(what, error=type(error).__name__, where=place)
        if told not in self.problems:
            self.problems.append(told)

    def score(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What the run's own description lets be known; whoever launched it has no say."""
        terms, plan = self.plan.scores, self.plan
        if terms is None:
            return dict(metrics)
        if self.private_score is None:
            book = partial(self.around.open_scores, plan)
            records = fingerprint_records(self.data.validation)
            noise = terms.noise_multiplier
            self.private_score = PrivateScore(
                book, terms.study, plan.run, plan.key_path, terms.metric, noise, records
            )
        return self.private_score(metrics, len(self.data.validation))

    def go_on(self, progress: Progress) -> bool:
        return self.around.go_on(progress)

    def notice(self, progress: Progress) -> Notice:
        every_s = self.plan.config.performance.checkpoint_every_s
        due = self.comms.rank == 0 and 0 < every_s <= time.monotonic() - self._saved_s
        return self.on_notice(Notice.DUE if due else Notice.NONE)

    def settle(self) -> None:
        if self.around.go_on is not _always:
            self.saver.settle()

    def checkpoint(self, progress: Progress, occasion: Occasion) -> bool:
        facts = {
            "run": self.plan.run,
            "step": progress.step,
            "attempt": self.attempt.number,
            "ledger_head": self.ledger.head if self.ledger else None,
            "executed_steps": self.earlier_steps + progress.executed,
            "metrics": dict(progress.metrics),
            "config": describe(self.plan.config),
        }
        begun = self.saver.save(progress.step, facts, occasion)
        if self.saver.failure is not None:
            self._survive(
                "a checkpoint was not written, and a later one was made instead", self.saver.failure
            )
        self._saved_s = time.monotonic()
        self.journal.note(
            "checkpoint begun" if begun else "checkpoint left out",
            step=progress.step,
            occasion=occasion.value,
        )
        return begun

    def committed(self, name: str, facts: Mapping[str, Any]) -> None:
        self.journal.note(
            "checkpoint committed",
            step=facts["step"],
            name=name,
            seconds=round(self.saver.lag_s, 3),
        )

    def progressed(self, progress: Progress) -> None:
        """Shows the progress; who cannot take it ends no run."""
        try:
            self._show(progress)
        except Exception as error:
            self._survive("progress could not be shown", error)

    def _show(self, progress: Progress) -> None:
        self.on_progress(progress, self.epsilon)
        figures = {"steps": progress.step, "steps_per_second": progress.steps_per_s,
        "epsilon_spent": self.epsilon,
                   "tokens_left": self.tokens_left, "upload_lag_seconds": self.saver.lag_s,
                   "checkpoints_skipped": self.saver.skipped,
                   "attempt": self.attempt.number}  # fmt: skip
        self.on_figures(
            {name: float(value) for name, value in figures.items() if value is not None}
        )
