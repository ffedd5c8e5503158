"""Proof that steps of an attempt are paid for; without it no noise is drawn (`privacy.noise`)."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import final

from grape_ray.accounting.mechanism import Mechanism
from grape_ray.errors import LedgerError, NoiseReuse

_LEDGER = object()  # what the ledger alone passes on


@final
@dataclass(frozen=True, slots=True)
class Grant:
    """Steps of one attempt that are paid for, durably: `first_step` to `first_step + steps - 1`.

    Made by `Ledger.charge` alone. A grant that travels between processes stays one. It pays for one
    noise a step: the first stream of noise that it serves is the only one.

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
    # the one stream that it serves, and the last step that was drawn from it
    _served: dict[str, int] = field(
        default_factory=dict[str, int], init=False, repr=False, compare=False
    )

    def __post_init__(self, made_by: object) -> None:
        if made_by is not _LEDGER:
            raise LedgerError(
                "a Grant is made by Ledger.charge alone",
                "a direct construction",
                "steps that were charged to a ledger",
                "call Ledger.charge before the noise of its steps is drawn",
            )

    def claim(self, step: int, stream: str) -> None:
        """Marks `step` as drawn from the stream of noise whose name is `stream`.

        Raises:
            LedgerError: it is not one of those that are paid for, or the grant serves another
                stream.
            NoiseReuse: it was drawn before, from a copy of the stream.
        """
        if not self.first_step <= step < self.first_step + self.steps:
            last = self.first_step + self.steps - 1
            paid = f"steps {self.first_step} to {last}" if self.steps else "no step"
            raise LedgerError(
                "the noise of a step that is not paid for",
                f"step {step}",
                f"{paid} of attempt {self.attempt} of run {self.run}",
                "charge the step to the ledger first",
            )
        last = self._served.setdefault(stream, -1) if not self._served else self._served.get(stream)
        if last is None:
            raise LedgerError(
                "a second stream of noise on one grant",
                f"stream {stream}",
                f"stream {next(iter(self._served))}, which was drawn from first",
                "begin an attempt for each stream, and charge its steps to the ledger",
            )
        if step <= last:
            raise NoiseReuse(
                "noise of a step that was already drawn",
                step,
                f"a step after {last}",
                "use one stream for each attempt, and each step once",
            )
        self._served[stream] = step
