"""The durable, hash-chained ledger of one dataset, from which every training step is paid before
its noise is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from grape_ray.accounting import calibration
from grape_ray.accounting.mechanism import (
    RECORD,
    check_count,
    check_delta,
    check_epsilon,
    check_name,
)
from grape_ray.accounting.selection import Selection
from grape_ray.errors import BudgetExceeded, LedgerError
from grape_ray.ledger.chain import Chain, Wanted
from grape_ray.ledger.charges import Attempt, StudyState
from grape_ray.ledger.entries import FORMAT, Study, check_reason
from grape_ray.ledger.grant import _LEDGER, Grant  # pyright: ignore[reportPrivateUsage]
from grape_ray.ledger.state import State
from grape_ray.storage import Storage

_Result = TypeVar("_Result")


class Ledger:
    """A chain of entries in a folder, each created exclusively, so that any number of writers agree
    on one order.

    Guarantees: what a method returns is durable; a study is never charged more than its tokens; a
    (run, attempt) number, and a step within an attempt, is granted once; when storage cannot be
    reached nothing is granted. Every call may be repeated after a failure. A charge whose answer
    was lost is found again by (study, run, attempt, chunk).

    >>> from grape_ray import Ledger, Mechanism, Study
    >>> ledger = Ledger.open("memory://example", "tickets-2026", epsilon=8.0, delta=1e-6)
    >>> step = Mechanism("poisson_gaussian", sampling_prob=0.01, noise_multiplier=1.1)
    >>> _ = ledger.ensure_study(Study("first", step, epsilon=3.0, delta=1e-6, tokens=100))
    >>> attempt = ledger.begin_attempt("first", "run", key_id="my-key")
    >>> ledger.charge("first", "run", attempt, chunk=0, steps=60).steps
    60
    >>> ledger.charge("first", "run", attempt, chunk=1, steps=60).steps  # the budget's end
    40
    """

    def __init__(self, storage: Storage):
        self._chain = Chain(storage)
        self._holder: str | None = None

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str] | Storage,
        dataset_id: str | None = None,
        epsilon: float | None = None,
        delta: float | None = None,
        create: bool = True,
        unit: str | None = None,
    ) -> Ledger:
        """The ledger at a folder, made if need be.

        Args:
            url: local path or fsspec URL.
            dataset_id: what the budget protects; None takes an existing ledger as it is.
            epsilon, delta: the budget of the dataset over all studies; needed to create, and
                compared when given.
            create: whether a missing ledger is made.
            unit: the privacy unit, by the name of its column; None is `record` for a new ledger,
                and takes an existing one as it is.

        Raises:
            LedgerError: missing, damaged, of another dataset, budget or unit, or out of reach.
            ConfigError: a number is out of range.
        """
        storage = url if isinstance(url, Storage) else Storage(url)
        ledger = cls(storage)
        # a gap is looked for once: to list the folder takes longer with every entry
        if ledger._chain.refreshed(thorough=True).next_seq == 0:
            if dataset_id is None or epsilon is None or delta is None or not create:
                fix = "check the location, or name dataset_id, epsilon and delta to make one"
                raise LedgerError(
                    "there is no ledger", storage.url, "a folder with 00000000.json", fix
                )
            budget = {"epsilon": check_epsilon(epsilon), "delta": check_delta(delta)}
            fields = {
                "ledger_id": os.urandom(16).hex(),
                "dataset_id": check_name("dataset_id", dataset_id),
                **budget,
                **({} if unit in (None, RECORD) else {"unit": check_name("unit", unit)}),
            }
            ledger._chain.append(
                # where another creator was faster, its opening is compared below like any other
                lambda state: (
                    None if state.next_seq else ("open", {"format": FORMAT, **fields}),
                    None,
                )
            )
        if unit is not None:
            ledger._chain.state.check_unit(unit)
        for name, wanted in (("dataset_id", dataset_id), ("epsilon", epsilon), ("delta", delta)):
            found = getattr(ledger._chain.state, name)
            if wanted is not None and wanted != found:
                # A run's journal keeps the error: no hash of the data may stand in it.
                got = None
                expected = "that of these records"
                fix = "one ledger serves one dataset: use another folder"
                if name != "dataset_id":
                    left = ledger._chain.state.left(name)
                    got = wanted
                    expected = (
                        f"{found:g}, which it was made with or raised to, {left:g} of it not"
                        " taken by a study"
                    )
                    fix = (
                        "leave the budget out to take the ledger as it is, or raise it with"
                        " `grape-ray ledger extend`"
                    )
                raise LedgerError(
                    f"the ledger {storage.url} has another {name}", got, expected, fix
                )
        return ledger

    @property
    def ledger_id(self) -> str:
        """A random name, to be a label of every key, so that two ledgers never lead to one key."""
        return self._chain.state.ledger_id

    @property
    def head(self) -> str:
        """Hash of the last entry known here; keep it elsewhere, and ``verify(url, head)`` finds a
        ledger that was rolled back.
        """
        return self._chain.state.head

    @property
    def state(self) -> State:
        """What the entries say, read anew; not to be changed.

        Raises:
            LedgerError: out of reach or damaged.
        """
        return self._chain.refreshed()

    def ensure_study(self, study: Study) -> StudyState:
        """Register a study, or find it as it was registered.

        Raises:
            BudgetExceeded: its tokens cost more than its epsilon and delta, or these exceed what
                the dataset has left.
            LedgerError: a different study has the name.
        """

        def decide(state: State):
            if study.name not in state.studies:
                if not calibration.affords(
                    study.mechanism, study.tokens, study.epsilon, study.delta
                ):
                    expected = (
                        "at most"
                        f" {calibration.steps_within(study.mechanism, study.epsilon, study.delta)}"
                    )
                    what = f"epsilon {study.epsilon:g} does not buy the steps"
                    raise BudgetExceeded(what, study.tokens, expected, "raise epsilon or noise")
                return ("study", study.payload()), None
            known = state.studies[study.name]
            if known.study != study:
                fix = "give the new study a new name"
                raise LedgerError(
                    f"study {study.name!r} was registered differently",
                    str(study),
                    str(known.study),
                    fix,
                )
            return None, known

        self._append(decide)
        return self._chain.state.study(study.name)

    def ensure_selection(self, selection: Selection) -> None:
        """Pay for a whole private selection, or find it as it was paid for.

        Raises:
            BudgetExceeded: it costs more than its epsilon and delta, or these exceed what the
                dataset has left.
            LedgerError: a different selection, or a study, has the name.
        """

        def decide(state: State):
            known = state.selections.get(selection.name)
            if known is not None and known != selection:
                raise LedgerError(
                    f"selection {selection.name!r} was registered differently",
                    str(selection),
                    str(known),
                    "use a new name",
                )
            if known is None and (cost := selection.cost()) > selection.epsilon:
                what = f"epsilon {selection.epsilon:g} does not buy the selection"
                raise BudgetExceeded(
                    what, f"{cost:.6g}", f"at most {selection.epsilon:g}", "raise epsilon or noise"
                )
            return (None if known else ("selection", selection.payload())), None

        self._append(decide)

    def extend(self, epsilon: float | None, delta: float | None, reason: str) -> None:
        """Raise the dataset's budget to (epsilon, delta) for what is registered from now on; None
        leaves one as it is.

        The reason stays in the chain. The same call again does nothing.

        Raises:
            LedgerError: not more than the budget now is, or out of reach. ConfigError: a number is
                out of range, or no reason is stated.
        """
        reason = check_reason(reason)

        def decide(state: State):
            raised = (
                check_epsilon(state.epsilon if epsilon is None else epsilon),
                check_delta(state.delta if delta is None else delta),
            )
            last = state.extensions[-1] if state.extensions else None
            if last is not None and (last.epsilon, last.delta, last.reason) == (*raised, reason):
                return None, None
            return ("extend", {"epsilon": raised[0], "delta": raised[1], "reason": reason}), None

        self._append(decide)

    def take_over(self, holder: str) -> int:
        """Begin an epoch: from now on this object writes for ``holder``, and the holders of earlier
        epochs write no more.

        Only holders bar one another; a ledger opened without a holder is not fenced, and is safe by
        the chain alone.

        Returns:
            The epoch's number, from 1.
        """
        check_name("holder", holder)

        def decide(state: State):
            return ("epoch", {"epoch": state.epoch + 1, "holder": holder}), state.epoch + 1

        # not fenced: this is what takes the ledger from an earlier holder
        epoch = self._chain.append(decide)
        self._holder = holder
        return epoch

    def begin_attempt(
        self, study: str, run: str, key_id: str, *, dataset_id: str | None = None
    ) -> int:
        """The number, from 1, of a new attempt of a run; every earlier attempt is over from now on.

        Derive the attempt's keys only after this returns: the number is durable by then, and is
        never given out again.

        Args:
            study, run: names.
            key_id: ``keys.key_id`` of the master key.
            dataset_id: fingerprint of the records that the attempt uses; None where it was compared
                when the ledger was opened.

        Raises:
            LedgerError: no such study, the ledger of other records, or out of reach.
        """
        check_name("run", run)
        check_name("key_id", key_id)

        def decide(state: State):
            # in the decision itself, so that no entry is written for other records
            state.check_dataset(dataset_id)
            number = len(state.study(study).runs.get(run, [])) + 1
            return (
                "attempt",
                {"study": study, "run": run, "attempt": number, "key_id": key_id},
            ), number

        return self._append(decide)

    def charge(
        self,
        study: str,
        run: str,
        attempt: int,
        chunk: int,
        steps: int,
        first_step: int | None = None,
        *,
        dataset_id: str | None = None,
    ) -> Grant:
        """Pay for the next steps of an attempt; their noise may be drawn once this has returned.

        Args:
            study, run, attempt: from ``begin_attempt``.
            chunk: number of the call, growing within the attempt; the same call again, while the
                attempt lasts, returns the same grant and costs nothing.
            steps: how many steps are asked for; fewer are granted at the end of the budget, and
                none (nothing is written) after it.
            first_step: the first step's number; by default the one after the steps paid for, or 0.
            dataset_id: as in ``begin_attempt``.

        Raises:
            LedgerError: the chunk was charged with other arguments, the ledger is of other records,
                or out of reach.
            NoiseReuse: a newer attempt has begun, the attempt is closed, or a step was paid for
                before in this attempt.
        """
        steps = check_count("steps", steps)
        chunk = check_count("chunk", chunk, 0)
        attempt = check_count("attempt", attempt)
        if first_step is not None:
            first_step = check_count("first_step", first_step, 0)

        def decide(state: State):
            state.check_dataset(dataset_id)
            owner = state.study(study)

            def granted(first: int, count: int) -> Grant:
                mechanism = owner.study.mechanism
                return Grant(study, run, attempt, chunk, first, count, mechanism, _LEDGER)

            known = state.attempt(study, run, attempt).charges.get(chunk)
            # what an attempt that is over was granted is refunded in part, or another's by now
            live = state.live_attempt(study, run, attempt)
            if known is not None:
                if known.asked != steps or first_step not in (None, known.first_step):
                    raise LedgerError(
                        f"chunk {chunk} was charged with other arguments",
                        f"{steps} steps from {first_step}",
                        f"{known.asked} steps from {known.first_step}",
                        "use a new chunk number",
                    )
                return None, granted(known.first_step, known.steps)
            first = live.next_step if first_step is None else first_step
            # fewer than asked for is an answer, not an error: the run ends where its budget does
            count = min(steps, owner.left)
            if count == 0:
                return None, granted(first, 0)
            where = {"study": study, "run": run, "attempt": attempt, "chunk": chunk}
            charged = {**where, "first_step": first, "asked": steps, "steps": count}
            return ("charge", charged), granted(first, count)

        return self._append(decide)

    def close_attempt(self, study: str, run: str, attempt: int) -> None:
        """End an attempt: it can be charged no more. Closing it again does nothing.

        Raises:
            LedgerError: no such attempt, or out of reach.
        """

        def decide(state: State):
            over = state.attempt(study, run, attempt).closed or attempt < len(
                state.study(study).runs[run]
            )
            return (
                None if over else ("close", {"study": study, "run": run, "attempt": attempt})
            ), None

        self._append(decide)

    def refund(self, study: str, run: str, attempt: int, chunk: int, steps: int) -> None:
        """Give back the last ``steps`` steps of the attempt's last chunk, and end the attempt, so
        that they never start.

        Only for steps whose noise was provably not drawn; a crash loses its chunk. The same call
        again does nothing.

        Raises:
            LedgerError: not the last chunk, more than was charged, refunded before with another
                count, or out of reach.
            NoiseReuse: the attempt is over.
        """
        steps = check_count("steps", steps)
        chunk = check_count("chunk", chunk, 0)
        attempt = check_count("attempt", attempt)

        def decide(state: State):
            if state.attempt(study, run, attempt).refunds.get(chunk) == steps:
                return None, None
            return (
                "refund",
                {"study": study, "run": run, "attempt": attempt, "chunk": chunk, "steps": steps},
            ), None

        self._append(decide)

    def attempts(self, study: str, run: str) -> Sequence[Attempt]:
        """The attempts of a run, in order, with what each was charged.

        Raises:
            LedgerError: no such study, or out of reach.
        """
        return tuple(self.state.study(study).runs.get(run, ()))

    def epsilon_spent(self, study: str) -> float:
        """Epsilon, at the study's delta, of the steps charged so far: for display. What is
        guaranteed is the study's epsilon.

        Raises:
            LedgerError: no such study, or out of reach.
        """
        known = self.state.study(study)
        return known.study.epsilon_of(known.used)

    def _append(self, decide: Callable[[State], tuple[Wanted, _Result]]) -> _Result:
        """Extend the chain, unless another holder has taken the ledger over."""

        # asked between reading and writing, so that who was overtaken learns it before the write
        def fenced(state: State) -> tuple[Wanted, _Result]:
            if self._holder is not None and state.holder != self._holder:
                got = f"epoch {state.epoch} of {state.holder}"
                fix = "stop: another cluster, or a newer process of this one, charges it now"
                raise LedgerError(
                    "the ledger was taken over", got, f"an epoch of {self._holder}", fix
                )
            return decide(state)

        return self._chain.append(fenced)
