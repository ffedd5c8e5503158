"""The training loop: reserve steps, take them, evaluate, checkpoint."""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from grape_ray.checkpoint.manager import Occasion
from grape_ray.config.schema import Performance
from grape_ray.distributed.comms import Comms
from grape_ray.privacy.redaction import withheld


@dataclass(frozen=True)
class Progress:
    """Where a run stands. Metrics are as the hooks release them, and of the rest the speed alone
    follows the private data.

    Attributes:
        step: steps that the model has taken, over all attempts; total: steps planned.
        executed: steps that this attempt has executed.
        steps_per_s: mean speed since this attempt's first step; larger batches take longer, and
            timing is not hidden (docs/privacy.md).
        metrics: the newest validation metrics, and the step they belong to.
        diverged: metrics that were not finite at this evaluation and at the one before.
    """

    step: int
    total: int
    executed: int = 0
    steps_per_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    metrics_step: int | None = None
    diverged: tuple[str, ...] = ()


class Notice(enum.IntEnum):
    """What is asked of a run: nothing, a checkpoint because time has passed, one at once (a machine
    will go), or one and an end.
    """

    NONE = 0
    DUE = 1
    SAVE = 2
    STOP = 3


@dataclass(frozen=True)
class Outcome:
    """How a loop ended.

    Attributes:
        progress: the last. exhausted: whether the budget ended it early; stopped: whether `go_on`
            did, or metrics that are not finite; interrupted: whether a notice did.
        paid_until: steps below it are paid for; those from `progress.step` on never started.
    """

    progress: Progress
    exhausted: bool
    stopped: bool
    paid_until: int
    interrupted: bool = False


class Hooks(Protocol):
    """What a loop needs of the world around it."""

    def reserve(self, step: int, count: int) -> int:
        """Pays for up to `count` steps from `step` on; returns how many are paid for, 0 at the
        budget's end. Rank 0 alone calls it.
        """
        ...

    @property
    def evaluates_together(self) -> bool:
        """Whether every rank must evaluate, as a model whose weights are spread over them needs;
        otherwise rank 0 does it alone.
        """
        ...

    def evaluate(self) -> dict[str, float] | None:
        """Validation metrics of the model as it is; None where they could not be had, which ends no
        run: the hooks keep the reason.
        """
        ...

    def score(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What may be known of the metrics. Rank 0 alone calls it, once an evaluation."""
        ...

    def checkpoint(self, progress: Progress, occasion: Occasion) -> bool:
        """Makes the state durable, in the background if it is merely due; whether it does. Every
        rank calls it, at the same steps.
        """
        ...

    def settle(self) -> None:
        """Waits until what `checkpoint` began is durable, where `go_on` needs it to be. Every rank
        calls it.
        """
        ...

    def notice(self, progress: Progress) -> Notice:
        """What the world asks for after a step, the same on every rank. Every rank calls it."""
        ...

    def go_on(self, progress: Progress) -> bool:
        """Asked on rank 0 after each evaluation that succeeded but the last, once all is durable:
        whether more steps are wanted.
        """
        ...

    def progressed(self, progress: Progress) -> None:
        """Told after each step, on rank 0, and last with the final metrics."""
        ...


def run_loop(
    take_step: Callable[[int], None],
    hooks: Hooks,
    performance: Performance,
    start: int,
    total: int,
    comms: Comms,
) -> Outcome:
    """Takes steps `start .. total` (0-based, half open), each paid for beforehand.

    A budget that ends before `total`, or `go_on`, ends the loop in good order: what was trained so
    far is checkpointed and evaluated, in this order, so that no evaluation can lose it. So do
    metrics that are not finite at two evaluations, if `performance` says so.

    Raises:
        What a hook raises on rank 0 is raised on every rank, so that no rank waits for ever.
    """
    progress = Progress(start, total)
    paid_until = start
    exhausted = False
    stopped = False
    notice = Notice.NONE
    # a run that does not begin at 0 begins at a checkpoint, which is not to be written again
    saved = start or None
    began = time.monotonic()
    while progress.step < total and not stopped and notice is not Notice.STOP:
        step = progress.step
        if step >= paid_until:
            wanted = min(performance.charge_chunk, total - step)
            paid_until = step + _on_rank_zero(comms, lambda s=step, w=wanted: hooks.reserve(s, w))
            if paid_until == step:
                exhausted = True
                break
        take_step(step)
        executed = progress.executed + 1
        speed = executed / max(time.monotonic() - began, 1e-9)
        progress = replace(progress, step=step + 1, executed=executed, steps_per_s=speed)
        if progress.step < total:
            if _due(progress.step, performance.eval_every):
                progress = _evaluated(progress, hooks, comms)
            notice = hooks.notice(progress)
            if notice or _due(progress.step, performance.checkpoint_every):
                occasion = Occasion.URGENT if notice > Notice.DUE else Occasion.DUE
                saved = progress.step if hooks.checkpoint(progress, occasion) else saved
            if comms.rank == 0:
                hooks.progressed(progress)
            if progress.metrics_step == progress.step:
                hooks.settle()
                stopped = not _on_rank_zero(comms, lambda p=progress: hooks.go_on(p))
                stopped = stopped or (performance.stop_on_nan and bool(progress.diverged))
    interrupted = notice is Notice.STOP and progress.step < total
    if saved != progress.step:
        hooks.checkpoint(progress, Occasion.LAST)
    if progress.metrics_step != progress.step and not interrupted:
        progress = _evaluated(progress, hooks, comms)
    if comms.rank == 0:
        hooks.progressed(progress)
    return Outcome(progress, exhausted, stopped, paid_until, interrupted)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluated(progress: Progress, hooks: Hooks, comms: Comms) -> Progress:
    """The progress with fresh metrics, which every rank gets from rank 0; as it was where there are
    none.
    """
    together = hooks.evaluates_together
    found = hooks.evaluate() if together else None

    def scored() -> dict[str, float] | None:
        mine = found if together else hooks.evaluate()
        return None if mine is None else hooks.score(mine)

    metrics = _on_rank_zero(comms, scored)
    if metrics is None:
        return progress
    diverged = tuple(
        n
        for n, v in metrics.items()
        if not (math.isfinite(v) or math.isfinite(progress.metrics.get(n, 0.0)))
    )
    return replace(progress, metrics=metrics, metrics_step=progress.step, diverged=diverged)


def _on_rank_zero(comms: Comms, call: Callable):
    """The result of `call` on rank 0, on every rank; its error, too, so that the others do not wait
    for a broadcast that never comes.
    """
    answer, own = None, None
    if comms.rank == 0:
        try:
            answer = call()
        except Exception as caught:
            own = caught
    answer, error = comms.broadcast_object((answer, own and withheld(own)))
    if error is not None:
        raise own or error
    return answer
