"""The rules of a ledger: the state that its entries lead to, and the refusal of an entry that
breaks a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

from grape_ray.accounting.mechanism import (
    RECORD,
    check_count,
    check_delta,
    check_epsilon,
    check_name,
)
from grape_ray.accounting.selection import Selection
from grape_ray.errors import BudgetExceeded, ConfigError, LedgerError, NoiseReuse
from grape_ray.ledger.charges import Attempt, Charge, StudyState
from grape_ray.ledger.entries import (
    FORMAT,
    GENESIS,
    Entry,
    Payload,
    Study,
    check_reason,
    selection_from,
)

_RESTORE = "restore the ledger from a copy"
# a sum of decimal shares, 0.1 + 0.2 of 0.3, may exceed the whole by a rounding
_ROUNDING = 1 + 1e-12


@dataclass(frozen=True)
class Extension:
    """A raise of the dataset's budget to (epsilon, delta), by the entry of that number, for a
    stated reason.
    """

    seq: int
    epsilon: float
    delta: float
    reason: str


@dataclass
class State:
    """Everything a chain of entries says; grows by ``apply`` alone, at a cost that does not depend
    on how many entries came before.

    ``epsilon`` and ``delta`` are the dataset's budget as it is now, after all ``extensions``, and
    ``unit`` is what it protects.
    ``taken`` is the sum of all shares: exact, so that it does not matter in which order, and when,
    they were added.
    """

    ledger_id: str = ""
    dataset_id: str = ""
    epsilon: float = 0.0
    delta: float = 0.0
    unit: str = RECORD
    studies: dict[str, StudyState] = field(default_factory=dict[str, StudyState])
    selections: dict[str, Selection] = field(default_factory=dict[str, Selection])
    taken: dict[str, Fraction] = field(
        default_factory=lambda: {"epsilon": Fraction(), "delta": Fraction()}
    )
    extensions: list[Extension] = field(default_factory=list[Extension])
    epoch: int = 0
    holder: str = ""
    next_seq: int = 0
    head: str = GENESIS

    def apply(self, entry: Entry) -> None:
        """Take the next entry in; the state is unchanged when ``check`` refuses it."""
        self.check(entry)()
        self.next_seq, self.head = entry.seq + 1, entry.hash

    def check(self, entry: Entry) -> Callable[[], None]:
        """Hold the next entry against the rules, and change nothing; what is returned makes the
        change.

        Raises:
            LedgerError, BudgetExceeded, NoiseReuse: the entry does not follow, or breaks a rule.
        """
        if entry.seq != self.next_seq:
            raise LedgerError(
                "the entry is out of order", entry.seq, f"seq {self.next_seq}", _RESTORE
            )
        if entry.prev != self.head:
            raise LedgerError(
                "the chain is broken before this entry", entry.prev[:12], self.head[:12], _RESTORE
            )
        if (entry.kind == "open") != (entry.seq == 0):
            raise LedgerError(
                "a ledger starts with its only opening", entry.kind, "open at seq 0 alone", _RESTORE
            )
        try:
            # a method for each kind in SCHEMA, which `decode` has held the kind against
            commit = getattr(self, f"_{entry.kind}")(entry.payload)
        except ConfigError as error:
            raise LedgerError(f"the entry holds what no ledger may: {error}") from error
        return commit

    def check_dataset(self, dataset_id: str | None) -> None:
        """Refuse to pay for the use of other records than the budget protects; None is not
        compared.

        Raises:
            LedgerError: of another dataset. It quotes no fingerprint: where errors are kept, a hash
                of the data must not be.
        """
        if dataset_id is not None and dataset_id != self.dataset_id:
            fix = (
                "charge the ledger of the records that are used: a field of the task may have"
                " changed them"
            )
            raise LedgerError(
                "the ledger is of another dataset",
                None,
                "the ledger of the records that are used",
                fix,
            )

    def check_unit(self, unit: str) -> None:
        """Refuse a share that protects another privacy unit: an epsilon for one record and one for
        all records of a user do not add up. Raises LedgerError.
        """
        if unit != self.unit:
            raise LedgerError(
                "the ledger is of another privacy unit",
                unit,
                f"{self.unit}, which its budget is for",
                "set privacy.unit to it, or keep the budgets apart: --ledger PLACE --second-ledger",
            )

    def left(self, unit: str) -> float:
        """What of the budget's ``epsilon`` or ``delta`` no study or selection has taken."""
        return max(0.0, getattr(self, unit) - float(self.taken[unit]))

    def study(self, name: str) -> StudyState:
        """The study of that name, or LedgerError."""
        if name not in self.studies:
            raise LedgerError(
                "the ledger knows no such study",
                name,
                ", ".join(sorted(self.studies)) or "a study",
                "register it first",
            )
        return self.studies[name]

    def attempt(self, study: str, run: str, number: int) -> Attempt:
        """That attempt, or LedgerError."""
        attempts = self.study(study).runs.get(run, [])
        if not 1 <= number <= len(attempts):
            raise LedgerError(
                f"run {run!r} has no such attempt",
                number,
                f"1 to {len(attempts)}",
                "begin the attempt first",
            )
        return attempts[number - 1]

    def live_attempt(self, study: str, run: str, number: int) -> Attempt:
        """That attempt, if it may still be charged.

        Raises:
            NoiseReuse: a later attempt has begun, or this one was closed.
        """
        attempt = self.attempt(study, run, number)
        latest = len(self.study(study).runs[run])
        if number != latest or attempt.closed:
            reason = f"attempt {latest} has begun" if number != latest else "it was closed"
            raise NoiseReuse(
                f"attempt {number} of run {run!r} is over: {reason}",
                None,
                "a live attempt",
                "stop this process",
            )
        return attempt

    def _open(self, payload: Payload) -> Callable[[], None]:
        if payload["format"] != FORMAT:
            raise LedgerError(
                "the ledger has another format",
                payload["format"],
                f"format {FORMAT}",
                "use the version that wrote it",
            )
        check_name("dataset_id", payload["dataset_id"])
        epsilon, delta = check_epsilon(payload["epsilon"]), check_delta(payload["delta"])
        unit = check_name("unit", payload.get("unit", RECORD))

        def commit() -> None:
            self.epsilon, self.delta, self.unit = epsilon, delta, unit
            self.ledger_id, self.dataset_id = payload["ledger_id"], payload["dataset_id"]

        return commit

    def _extend(self, payload: Payload) -> Callable[[], None]:
        """Holds from here on: what was registered before had to fit into the budget of its time."""
        raised = Extension(
            self.next_seq,
            check_epsilon(payload["epsilon"]),
            check_delta(payload["delta"]),
            check_reason(payload["reason"]),
        )
        if (
            raised.epsilon < self.epsilon
            or raised.delta < self.delta
            or (raised.epsilon, raised.delta) == (self.epsilon, self.delta)
        ):
            got, now = (
                f"epsilon {e:g}, delta {d:g}"
                for e, d in ((raised.epsilon, raised.delta), (self.epsilon, self.delta))
            )
            raise LedgerError(
                "a budget can only be raised",
                got,
                f"more than {now}",
                "name a higher one: a guarantee that was given is not undone",
            )

        def commit() -> None:
            self.epsilon, self.delta = raised.epsilon, raised.delta
            self.extensions.append(raised)

        return commit

    def _study(self, payload: Payload) -> Callable[[], None]:
        study = Study.from_payload(payload)
        self.check_share(study)

        def commit() -> None:
            self.studies[study.name] = StudyState(study)
            self._take(study)

        return commit

    def _selection(self, payload: Payload) -> Callable[[], None]:
        selection = selection_from(payload)
        self.check_share(selection)

        def commit() -> None:
            self.selections[selection.name] = selection
            self._take(selection)

        return commit

    def _take(self, share: Study | Selection) -> None:
        self.taken = {
            "epsilon": self.taken["epsilon"] + Fraction(share.epsilon),
            "delta": self.taken["delta"] + Fraction(share.delta),
        }

    def check_share(self, share: Study | Selection) -> None:
        """Refuse a name that is taken, another privacy unit, and a share above what is left of the
        dataset's budget. Raises LedgerError, BudgetExceeded.
        """
        self.check_unit(share.unit)
        if share.name in self.studies or share.name in self.selections:
            raise LedgerError(
                "a study is registered twice", share.name, "one entry a study", _RESTORE
            )
        for unit, budget in (("epsilon", self.epsilon), ("delta", self.delta)):
            taken = float(self.taken[unit])
            if taken + getattr(share, unit) > budget * _ROUNDING:
                expected = (
                    f"{unit} <= {max(0.0, budget - taken):.6g}, what other studies leave of the"
                    f" dataset's {budget:g}"
                )
                what = f"study {share.name!r} costs too much"
                raise BudgetExceeded(
                    what, f"{unit} {getattr(share, unit):g}", expected, "lower its share"
                )

    def _epoch(self, payload: Payload) -> Callable[[], None]:
        check_name("holder", payload["holder"])
        if payload["epoch"] != self.epoch + 1:
            raise LedgerError(
                "an epoch has a wrong number", payload["epoch"], f"{self.epoch + 1}", _RESTORE
            )

        def commit() -> None:
            self.epoch, self.holder = payload["epoch"], payload["holder"]

        return commit

    def _attempt(self, payload: Payload) -> Callable[[], None]:
        state = self.study(payload["study"])
        check_name("run", payload["run"])
        attempts = state.runs.get(payload["run"], [])
        if payload["attempt"] != len(attempts) + 1:
            what = f"attempt of run {payload['run']!r} has a wrong number"
            raise NoiseReuse(
                what,
                payload["attempt"],
                f"{len(attempts) + 1}: each number is used once",
                "begin a new attempt",
            )
        return lambda: state.runs.setdefault(payload["run"], []).append(
            Attempt(payload["attempt"], payload["key_id"])
        )

    def _charge(self, payload: Payload) -> Callable[[], None]:
        charge = Charge(payload["chunk"], payload["first_step"], payload["asked"], payload["steps"])
        attempt = self.live_attempt(payload["study"], payload["run"], payload["attempt"])
        check_count("steps", charge.steps)
        if charge.steps > charge.asked:
            raise LedgerError(
                "more steps granted than asked for",
                charge.steps,
                f"at most {charge.asked}",
                _RESTORE,
            )
        # a lower number is a repetition, which `Ledger.charge` answers without an entry
        last = attempt.last.chunk if attempt.last else -1
        if charge.chunk <= last:
            expected = f"above {last}"
            raise LedgerError(
                "a chunk's number does not grow",
                charge.chunk,
                expected,
                "number the chunks of an attempt upwards",
            )
        # the same key and step would be the same noise under another sum
        if charge.first_step < attempt.next_step:
            fix = "begin a new attempt, which has a new key"
            raise NoiseReuse(
                "a step is asked for twice under one key",
                charge.first_step,
                f"{attempt.next_step} or later",
                fix,
            )
        study = self.study(payload["study"])
        if charge.steps > study.left:
            what = f"study {payload['study']!r} is overdrawn"
            raise BudgetExceeded(
                what, f"{charge.steps} steps", f"at most {study.left}", "stop training"
            )
        return lambda: study.charge(attempt, charge)

    def _refund(self, payload: Payload) -> Callable[[], None]:
        attempt = self.live_attempt(payload["study"], payload["run"], payload["attempt"])
        last, steps = attempt.last, payload["steps"]
        # only the last chunk can hold steps that never started
        if last is None or payload["chunk"] != last.chunk or last.chunk in attempt.refunds:
            what = f"chunk {payload['chunk']} cannot be refunded"
            raise LedgerError(
                what, None, "the attempt's last chunk, once", "refund nothing that may have started"
            )
        check_count("steps", steps)
        if steps > last.steps:
            raise LedgerError(
                "a refund above its charge",
                steps,
                f"at most {last.steps}",
                "refund only steps that never started",
            )
        return lambda: self.study(payload["study"]).refund(attempt, last.chunk, steps)

    def _close(self, payload: Payload) -> Callable[[], None]:
        attempt = self.live_attempt(payload["study"], payload["run"], payload["attempt"])
        return lambda: setattr(attempt, "closed", True)
