"""Where a run stands, what is asked of it from outside, and how its loop ended."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Where a run stands. Metrics are as the run may release them; of the rest, the speed alone
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


class Signal(enum.IntEnum):
    """What is asked of a run after a step; the larger one wins.

    CHECKPOINT_DUE: a checkpoint, because time has passed. CHECKPOINT_NOW: one that is waited for,
    because a machine will go. STOP: a checkpoint that is waited for, and the end.
    """

    NONE = 0
    CHECKPOINT_DUE = 1
    CHECKPOINT_NOW = 2
    STOP = 3


@dataclass(frozen=True)
class Outcome:
    """How a loop ended.

    Attributes:
        progress: the last. exhausted: whether the budget ended it early.
        stopped: whether `should_continue` did, or metrics that are not finite.
        interrupted: whether a signal did. paid_until: the first step that is not paid for.
    """

    progress: Progress
    exhausted: bool
    stopped: bool
    paid_until: int
    interrupted: bool = False
