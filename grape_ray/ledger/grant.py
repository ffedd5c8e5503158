"""Proof that steps of an attempt are paid for; without it no noise is drawn (`privacy.noise`)."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

from grape_ray.accounting.mechanism import Mechanism
from grape_ray.errors import LedgerError

_LEDGER = object()  # what the ledger alone passes on


@dataclass(frozen=True)
class Grant:
    """Steps of one attempt that are paid for, durably: `first_step` to `first_step + steps - 1`.

    Made by `Ledger.charge` alone. A grant that travels between processes stays one.

    Attributes:
        study, run, attempt, chunk: what was charged. steps: 0 where the study's budget has ended.
        mechanism: what each of the steps was paid for as; its noise is the noise that is drawn.
    """

    study: str
    run: str
    attempt: int
    chunk: int
    first_step: int
    steps: int
    mechanism: Mechanism
    made_by: InitVar[object] = None

    def __post_init__(self, made_by: object) -> None:
        if made_by is not _LEDGER:
            raise LedgerError(
                "a Grant is made by Ledger.charge alone",
                "a direct construction",
                "steps that were charged to a ledger",
                "call Ledger.charge before the noise of its steps is drawn",
            )

    def check(self, step: int) -> None:
        """Raises LedgerError unless `step` is one of those that are paid for."""
        if not self.first_step <= step < self.first_step + self.steps:
            last = self.first_step + self.steps - 1
            paid = f"steps {self.first_step} to {last}" if self.steps else "no step"
            raise LedgerError(
                "the noise of a step that is not paid for",
                f"step {step}",
                f"{paid} of attempt {self.attempt} of run {self.run}",
                "charge the step to the ledger first",
            )
