"""What the runs of a study were charged: sums that grow with each entry, so that no question walks
over all charges.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from grape_ray.ledger.entries import Study


@dataclass(frozen=True)
class Charge:
    """A chunk of steps that was paid for: ``steps`` of the ``asked``, from ``first_step`` on."""

    chunk: int
    first_step: int
    asked: int
    steps: int


@dataclass
class Attempt:
    """What one attempt of a run has been charged; its study changes it (`StudyState`).

    Attributes:
        charges: by chunk, in the order of their growing numbers. refunds: steps given back, by
            chunk. closed: whether it is over.
        used: steps charged less steps refunded. next_step: the first step whose noise the attempt
            has not paid for yet.
    """

    number: int
    key_id: str
    charges: dict[int, Charge] = field(default_factory=dict[int, Charge])
    refunds: dict[int, int] = field(default_factory=dict[int, int])
    closed: bool = False
    used: int = 0
    next_step: int = 0

    @property
    def last(self) -> Charge | None:
        """The newest charge."""
        return self.charges[next(reversed(self.charges))] if self.charges else None


@dataclass
class StudyState:
    """A study and the attempts of its runs, by run name, in order. ``used``: its tokens that are
    gone, the sum over all attempts.
    """

    study: Study
    runs: dict[str, list[Attempt]] = field(default_factory=dict[str, list[Attempt]])
    used: int = 0

    @property
    def left(self) -> int:
        """Tokens that can still be charged."""
        return self.study.tokens - self.used

    def charge(self, attempt: Attempt, charge: Charge) -> None:
        """Add a charge that the rules allow: its chunk and its steps lie beyond all earlier
        ones.
        """
        attempt.charges[charge.chunk] = charge
        attempt.next_step = charge.first_step + charge.steps
        attempt.used += charge.steps
        self.used += charge.steps

    def refund(self, attempt: Attempt, chunk: int, steps: int) -> None:
        """Add a refund that the rules allow, and end the attempt: what was refunded can never
        start any more.
        """
        attempt.refunds[chunk] = steps
        attempt.closed = True
        attempt.used -= steps
        self.used -= steps
