"""What a run calls on its way: who watches it, who may stop it, and who keeps its ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from grape_ray.distributed.comms import Comms
from grape_ray.ledger.interface import LedgerClient
from grape_ray.storage import Json
from grape_ray.training import attempt
from grape_ray.training.attempt import Attempt
from grape_ray.training.plan import Plan
from grape_ray.training.progress import Progress, Signal


@dataclass(frozen=True)
class RunCallbacks:
    """What a run calls on its way; by default it keeps its own ledger and nobody interferes.

    Attributes:
        open_ledger, open_score_ledger: give the ledgers of the training records and of private
            validation records; called on rank 0.
        begin_attempt: gives the attempt and its keys; called on every rank, on rank 0 with the
            ledger.
        on_step: given the number of each step before it is taken, on rank 0.
        on_progress: given (progress, epsilon spent or None) after each step, on rank 0; None keeps
            them in a file of the run's folder.
        on_gauges: given numbers for a monitor after each step, on rank 0 (ray_backend.metrics).
        on_checkpoint: given (name, metadata) of each committed checkpoint, on every rank; of the
            last one once more when its metrics are known.
        agree_on_signal: given what this rank asks for; returns what all ranks do. Called after each
            step, on every rank.
        should_continue: asked on rank 0 after each evaluation but the last, once all is durable;
            may wait as long as it likes. None never stops the run.
        on_end: called when the loop is over, however it ended, on every rank.
    """

    open_ledger: Callable[[Plan], LedgerClient] = attempt.open_ledger
    open_score_ledger: Callable[[Plan], LedgerClient] = attempt.open_score_ledger
    begin_attempt: Callable[[Plan, Comms, LedgerClient | None], Attempt] = attempt.begin_attempt
    on_step: Callable[[int], None] = lambda step: None
    on_progress: Callable[[Progress, float | None], None] | None = None
    on_gauges: Callable[[Mapping[str, float]], None] = lambda gauges: None
    on_checkpoint: Callable[[str, Json], None] = lambda name, metadata: None
    agree_on_signal: Callable[[Signal], Signal] = lambda own: own
    should_continue: Callable[[Progress], bool] | None = None
    on_end: Callable[[], None] = lambda: None
