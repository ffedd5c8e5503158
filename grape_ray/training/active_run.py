"""A run in progress on one rank: pays for steps, evaluates, checkpoints, reports."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from grape_ray.checkpoint.manager import CheckpointManager, Occasion
from grape_ray.config.description import describe
from grape_ray.data.fingerprints import fingerprint_records
from grape_ray.distributed import sharding
from grape_ray.distributed.comms import Comms
from grape_ray.ledger.grant import Grant
from grape_ray.ledger.interface import LedgerClient
from grape_ray.privacy.rank_zero import on_rank_zero
from grape_ray.privacy.redaction import is_ours, where
from grape_ray.storage import Json
from grape_ray.tasks.metrics import plain
from grape_ray.tasks.task import Data, Task
from grape_ray.training.attempt import Attempt
from grape_ray.training.callbacks import RunCallbacks
from grape_ray.training.journal import Journal
from grape_ray.training.plan import Plan
from grape_ray.training.private_scores import PrivateScore
from grape_ray.training.progress import Progress, Signal


@dataclass
class ActiveRun:
    """A run in progress on one rank; its loop (`training.loop`) calls these methods.

    Attributes:
        task: as steps and evaluations see it.
        ledger: on rank 0; None for the non-private baseline.
        earlier_steps: executed before this attempt, as far as is known.
        grant: what the steps at hand are paid with. chunk: how many grants were asked for.
        epsilon: spent by the study so far. tokens_left: of a study that is the run's own.
        problems: what failed without ending the run, in lines for a person.
    """

    plan: Plan
    comms: Comms
    callbacks: RunCallbacks
    attempt: Attempt
    data: Data
    task: Task
    model: torch.nn.Module
    checkpoints: CheckpointManager
    journal: Journal
    earlier_steps: int
    ledger: LedgerClient | None
    grant: Grant | None = None
    chunk: int = 0
    epsilon: float | None = None
    tokens_left: int | None = None
    private_score: PrivateScore | None = None
    problems: list[str] = field(default_factory=list)
    _saved_s: float = field(default_factory=time.monotonic)

    def reserve(self, step: int, count: int) -> int:
        """Pays for up to `count` steps from `step` on; returns how many are paid for, 0 at the
        budget's end. Every rank calls it.
        """
        if self.plan.ledger is None:
            return count
        self.grant = on_rank_zero(self.comms, partial(self._charge, step, count))
        return self.grant.steps

    def _charge(self, step: int, count: int) -> Grant:
        plan, number = self.plan, self.attempt.number
        ledger = self.ledger
        assert ledger is not None
        if plan.study == plan.run and self.tokens_left is None:
            used = sum(each.used for each in ledger.attempts(plan.study, plan.run))
            self.tokens_left = plan.tokens - used
        grant = ledger.charge(
            plan.study,
            plan.run,
            number,
            self.chunk,
            count,
            first_step=step,
            # of the records at hand, not of the plan: the ledger refuses to pay for others
            dataset_id=self.data.dataset_id,
        )
        self.chunk += 1
        # of the whole study, which other runs may charge as well
        self.epsilon = ledger.epsilon_spent(plan.study)
        if self.tokens_left is not None:
            self.tokens_left -= grant.steps
        self.journal.note(
            "charged",
            first_step=step,
            steps=grant.steps,
            epsilon=self.epsilon,
            tokens_left=self.tokens_left,
        )
        return grant

    def close_attempt(self, unused: int) -> None:
        """Ends the attempt, on rank 0; gives back `unused` steps, paid for and never started."""
        plan, number = self.plan, self.attempt.number
        # A refund closes the attempt, too.
        if self.ledger is None:
            return
        if unused:
            self.ledger.refund(plan.study, plan.run, number, self.chunk - 1, unused)
        else:
            self.ledger.close_attempt(plan.study, plan.run, number)

    @property
    def evaluates_together(self) -> bool:
        """Whether every rank must evaluate, as a model whose weights are sharded over them needs;
        otherwise rank 0 does it alone.
        """
        return sharding.is_sharded(self.model)

    def evaluate(self) -> dict[str, float] | None:
        """Validation metrics of the model as it is; None where they could not be computed, which
        ends no run: the reason is kept; none where nothing may be told of them.
        """
        if self.plan.scores is None and not self.data.validation_public:
            return {}
        try:
            # the model is released: whatever is asked of it costs nothing more
            return plain(self.task.evaluate(self.model, self.data.validation))
        except Exception as error:
            self._note_problem("an evaluation failed", error)
            return None

    def _note_problem(self, what: str, error: Exception) -> None:
        """Notes a failure that ends no run, each one once; its text only where it cannot quote a
        record.
        """
        place, may_quote = where(error), not (self.plan.public or is_ours(error))
        reason = f" at {place[-1] if place else 'an unknown place'}" if may_quote else f": {error}"
        problem = " ".join(f"{what}: {type(error).__name__}{reason}".split())
        self.journal.note(what, error=type(error).__name__, where=place)
        if problem not in self.problems:
            self.problems.append(problem)

    def score(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics as they may be released: unchanged where the validation records are public,
        otherwise one noised score that is charged to their ledger. The run's own description says
        which, not who launched it. Rank 0 alone calls it, once an evaluation.
        """
        terms, plan = self.plan.scores, self.plan
        if terms is None:
            return dict(metrics)
        if self.private_score is None:
            self.private_score = PrivateScore(
                partial(self.callbacks.open_score_ledger, plan),
                terms,
                plan.run,
                plan.key_path,
                fingerprint_records(self.data.validation),
            )
        return self.private_score(metrics, len(self.data.validation))

    def should_continue(self, progress: Progress) -> bool:
        """Whether more steps are wanted, asked after an evaluation. Every rank calls it."""
        ask = self.callbacks.should_continue
        if ask is None:
            return True
        self.checkpoints.flush()  # whoever stops a run may take over its checkpoint
        return on_rank_zero(self.comms, partial(ask, progress))

    def signal(self) -> Signal:
        """What is asked for after a step, the same on every rank. Every rank calls it."""
        every_s = self.plan.config.performance.checkpoint_every_s
        # Clocks of ranks differ, so rank 0's alone decides, and all agree on it below.
        due = self.comms.rank == 0 and 0 < every_s <= time.monotonic() - self._saved_s
        return self.callbacks.agree_on_signal(Signal.CHECKPOINT_DUE if due else Signal.NONE)

    def checkpoint(self, progress: Progress, occasion: Occasion) -> bool:
        """Makes the state durable, in the background if it is merely due; whether it does. Every
        rank calls it, at the same steps.
        """
        metadata = {
            "run": self.plan.run,
            "step": progress.step,
            "attempt": self.attempt.number,
            "ledger_head": self.ledger.head if self.ledger else None,
            "executed_steps": self.earlier_steps + progress.executed,
            "metrics": dict(progress.metrics),
            "config": describe(self.plan.config),
        }
        begun = self.checkpoints.save(progress.step, metadata, occasion)
        failure = self.checkpoints.failure
        if failure is not None:
            self._note_problem(
                "a checkpoint was not written, and a later one was made instead", failure
            )
        self._saved_s = time.monotonic()
        event = "checkpoint begun" if begun else "checkpoint skipped"
        self.journal.note(event, step=progress.step, occasion=occasion.value)
        return begun

    def committed(self, name: str, metadata: Json) -> None:
        """A checkpoint is durable."""
        seconds = round(self.checkpoints.lag_s, 3)
        self.journal.note("checkpoint committed", step=metadata["step"], name=name, seconds=seconds)
        self.callbacks.on_checkpoint(name, metadata)

    def progressed(self, progress: Progress) -> None:
        """Shows the progress after a step, on rank 0; a watcher that fails ends no run."""
        try:
            self._show(progress)
        except Exception as error:
            self._note_problem("progress could not be shown", error)

    def _show(self, progress: Progress) -> None:
        (self.callbacks.on_progress or self.journal.progress)(progress, self.epsilon)
        gauges = {
            "steps": progress.step,
            "steps_per_second": progress.steps_per_s,
            "epsilon_spent": self.epsilon,
            "tokens_left": self.tokens_left,
            "upload_lag_seconds": self.checkpoints.lag_s,
            "checkpoints_skipped": self.checkpoints.skipped,
            "attempt": self.attempt.number,
        }
        self.callbacks.on_gauges({name: float(v) for name, v in gauges.items() if v is not None})
