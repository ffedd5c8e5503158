"""The training loop: reserve steps, take them, evaluate, checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from grape_ray.checkpoint.manager import Occasion
from grape_ray.config.schema import Performance
from grape_ray.privacy.rank_zero import on_rank_zero
from grape_ray.training.active_run import ActiveRun
from grape_ray.training.progress import Outcome, Progress, Signal


def run_loop(
    take_step: Callable[[int], None],
    run: ActiveRun,
    performance: Performance,
    start: int,
    total: int,
) -> Outcome:
    """Takes steps `start .. total` (0-based, half open), each paid for beforehand.

    A budget that ends before `total`, or `should_continue`, ends the loop gracefully: what was
    trained so far is checkpointed and evaluated, in this order, so that no evaluation can lose it.
    So do metrics that are not finite at two evaluations, if `performance` says so.

    Raises:
        What a method of `run` raises on rank 0 is raised on every rank, so that no rank waits for
        ever.
    """
    progress, signal = Progress(start, total), Signal.NONE
    paid_until, exhausted, stopped = start, False, False
    # A run that does not begin at 0 begins at a checkpoint, which is not to be written again.
    saved = start or None
    began = time.monotonic()
    while progress.step < total and not stopped and signal is not Signal.STOP:
        step = progress.step
        if step >= paid_until:
            paid_until = step + run.reserve(step, min(performance.charge_chunk, total - step))
            if paid_until == step:
                exhausted = True
                break
        take_step(step)
        executed = progress.executed + 1
        speed = executed / max(time.monotonic() - began, 1e-9)
        progress = replace(progress, step=step + 1, executed=executed, steps_per_s=speed)
        if progress.step < total:
            if _due(progress.step, performance.eval_every):
                progress = _evaluated(progress, run)
            signal = run.signal()
            if signal or _due(progress.step, performance.checkpoint_every):
                urgent = signal > Signal.CHECKPOINT_DUE
                occasion = Occasion.URGENT if urgent else Occasion.DUE
                saved = progress.step if run.checkpoint(progress, occasion) else saved
            if run.comms.rank == 0:
                run.progressed(progress)
            if progress.metrics_step == progress.step:
                stopped = not run.should_continue(progress)
                stopped = stopped or (performance.stop_on_nan and bool(progress.diverged))
    interrupted = signal is Signal.STOP and progress.step < total
    # before the evaluation, which may fail
    if saved != progress.step:
        run.checkpoint(progress, Occasion.LAST)
    if progress.metrics_step != progress.step and not interrupted:
        progress = _evaluated(progress, run)
    if run.comms.rank == 0:
        run.progressed(progress)
    return Outcome(progress, exhausted, stopped, paid_until, interrupted)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluated(progress: Progress, run: ActiveRun) -> Progress:
    """The progress with fresh metrics, which every rank gets from rank 0; as it was where there are
    none.
    """
    together = run.evaluates_together
    found = run.evaluate() if together else None

    def scored() -> dict[str, float] | None:
        mine = found if together else run.evaluate()
        return None if mine is None else run.score(mine)

    metrics = on_rank_zero(run.comms, scored)
    if metrics is None:
        return progress
    before = progress.metrics
    diverged = tuple(
        name
        for name, value in metrics.items()
        if not (math.isfinite(value) or math.isfinite(before.get(name, 0.0)))
    )
    return replace(progress, metrics=metrics, metrics_step=progress.step, diverged=diverged)
