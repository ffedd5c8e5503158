"""The accountant of a cluster: one named actor that charges a ledger, and the client through which
trials ask it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.exceptions

from grape_ray.accounting.selection import Selection
from grape_ray.errors import GrapeRayError, LedgerError
from grape_ray.ledger.charges import Attempt
from grape_ray.ledger.entries import Study
from grape_ray.ledger.grant import Grant
from grape_ray.ledger.lease import BEAT_S, Claim
from grape_ray.ledger.ledger import Ledger
from grape_ray.privacy.redaction import text_of
from grape_ray.ray_backend.metrics import StudyGauges
from grape_ray.storage import Storage
from grape_ray.tuning.sweep import BudgetShare, Sweep

NAMESPACE = "grape-ray"
_CALLS = frozenset(
    {
        "ensure_study",
        "ensure_selection",
        "begin_attempt",
        "charge",
        "refund",
        "close_attempt",
        "attempts",
    }
)
_TIMEOUT_S = 120.0
_TRIES, _PAUSE_S = 5, 0.5
_GAUGE_EVERY_S = 3.0
_HEAD = "node:__internal_head__"


class _Desk:
    """The actor: a thin shell over the ledger. It may die at any moment: what it said is in the
    ledger, and its calls may be repeated.

    Args:
        url: the ledger's folder. cluster: a name for this cluster, kept when the actor is
            restarted. beat_s: see Claim.
    """

    def __init__(self, url: str, cluster: str, beat_s: float):
        self._url, self._cluster, self._beat_s = url, cluster, beat_s
        self._ledger: Ledger | None = None
        self._claim: Claim | None = None
        self._used: dict[str, tuple[Study, int]] = {}
        self._users: set[str] = set()
        self._gauges = StudyGauges()

    def hold(self, user: str) -> str:
        """Opens the ledger for this cluster alone, and for a sweep of it; returns its id."""
        found = self._open().ledger_id
        self._users.add(user)
        return found

    def call(self, method: str, *arguments: Any, **named: Any) -> tuple[Any, str]:
        """(What the ledger's method returns, the ledger's head after it)."""
        if method not in _CALLS:
            raise LedgerError("the accountant has no such call", method, ", ".join(sorted(_CALLS)))
        ledger = self._open()
        result = getattr(ledger, method)(*arguments, **named)
        if method in ("charge", "refund"):
            self._measure(ledger, arguments[0])
        return None if method == "ensure_study" else result, ledger.head

    def counts(self, study: str) -> tuple[Study, int]:
        """(The study, its tokens gone)."""
        known = self._open().state.study(study)
        return known.study, known.used

    def release(self, user: str) -> bool:
        """Lets another cluster have the ledger at once, when no other sweep of this one uses it;
        returns whether that is so.
        """
        self._users.discard(user)
        if self._users:
            return False
        if self._claim is not None:
            self._claim.release()
        self._ledger = self._claim = None
        return True

    def _open(self) -> Ledger:
        """Not in the constructor: an actor whose constructor fails is never restarted, and storage
        may be back in a minute.
        """
        if self._ledger is None:
            ledger = Ledger.open(self._url, create=False)
            claim = Claim(Storage(self._url), self._cluster, self._beat_s)
            claim.take()
            ledger.take_over(f"{self._cluster}/{os.getpid()}-{secrets.token_hex(4)}")
            self._ledger, self._claim = ledger, claim
            threading.Thread(target=self._show, daemon=True).start()
        return self._ledger

    def _measure(self, ledger: Ledger, study: str) -> None:
        known = ledger.state.study(study)
        self._used[study] = known.study, known.used
        self._gauges.set(ledger.ledger_id, study, steps_charged=known.used, tokens_left=known.left)

    def _show(self) -> None:
        """Epsilon takes a moment to compute, so it is shown now and then, and never between a call
        and its answer.
        """
        shown: dict[str, int] = {}
        wait = threading.Event()
        while self._ledger is not None:
            for name, (study, used) in list(self._used.items()):
                if used and shown.get(name) != used:
                    shown[name] = used
                    spent = study.epsilon_of(used)
                    self._gauges.set(self._ledger.ledger_id, name, epsilon_spent=spent)
            wait.wait(_GAUGE_EVERY_S)


class Accountant:
    """The accountant's client; can be sent to any worker of the cluster, and stands in for the
    ledger (`accounting.book.Book`).

    Guarantees: those of the ledger. A call that meets a dying actor is repeated on its successor.
    Where the actor cannot be had, or cannot reach the ledger, nothing is granted.

    Args:
        url: the ledger's folder, by which the actor is found. beat_s: see Claim.
    """

    def __init__(self, url: str, beat_s: float = BEAT_S):
        self._url, self._beat_s, self._user = url, beat_s, secrets.token_hex(8)
        self._ledger_id, self._head = "", ""

    @classmethod
    def start(cls, url: str, beat_s: float = BEAT_S) -> Accountant:
        """The accountant of this cluster for a ledger that exists, made if need be; to be released.

        Raises:
            LedgerError: there is no ledger, it cannot be reached, or another cluster holds it.
        """
        made = cls(Storage(url).url, beat_s)
        made._ledger_id = made._ask("hold", made._user)
        return made

    @property
    def ledger_id(self) -> str:
        """A random name, to be a label of every key."""
        return self._ledger_id

    @property
    def head(self) -> str:
        """Hash of the ledger's last entry after this client's last call."""
        return self._head

    def ensure_study(self, study: Study) -> None:
        """See Ledger.ensure_study."""
        self._call("ensure_study", study)

    def ensure_selection(self, selection: Selection) -> None:
        """See Ledger.ensure_selection."""
        self._call("ensure_selection", selection)

    def begin_attempt(
        self, study: str, run: str, key_id: str, *, dataset_id: str | None = None
    ) -> int:
        """See Ledger.begin_attempt; a repeated call may skip a number, which costs nothing."""
        return self._call("begin_attempt", study, run, key_id, dataset_id=dataset_id)

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
        """See Ledger.charge."""
        return self._call(
            "charge", study, run, attempt, chunk, steps, first_step, dataset_id=dataset_id
        )

    def refund(self, study: str, run: str, attempt: int, chunk: int, steps: int) -> None:
        """See Ledger.refund."""
        self._call("refund", study, run, attempt, chunk, steps)

    def close_attempt(self, study: str, run: str, attempt: int) -> None:
        """See Ledger.close_attempt."""
        self._call("close_attempt", study, run, attempt)

    def attempts(self, study: str, run: str) -> Sequence[Attempt]:
        """See Ledger.attempts."""
        return self._call("attempts", study, run)

    def counts(self, study: str) -> tuple[Study, int]:
        """(The study, its tokens gone)."""
        return self._ask("counts", study)

    def epsilon_spent(self, study: str) -> float:
        """See Ledger.epsilon_spent; computed here, so that nobody else waits for it."""
        known, used = self.counts(study)
        return known.epsilon_of(used)

    def release(self) -> None:
        """Ends the actor, when no other sweep of the cluster uses it, and lets another cluster have
        the ledger at once.
        """
        with contextlib.suppress(LedgerError):
            if self._ask("release", self._user):
                ray.kill(self._actor(), no_restart=True)

    def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        result, self._head = self._ask("call", method, *arguments, **named)
        return result

    def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """The actor's answer, or its own error; LedgerError for whatever kept it from answering."""
        fix = "nothing was granted; start the sweep again to resume it"
        for _ in range(_TRIES):
            try:
                return ray.get(
                    getattr(self._actor(), method).remote(*arguments, **named), timeout=_TIMEOUT_S
                )
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, GrapeRayError):
                    raise error.cause from None
                raise LedgerError(
                    "the accountant failed", text_of(error.cause), "an answer", fix
                ) from error
            except (
                ray.exceptions.ActorDiedError
            ):  # ended for good, by another sweep's end or by hand: a new one reads the same ledger
                time.sleep(_PAUSE_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                what = "the accountant does not answer"
                raise LedgerError(
                    what, type(error).__name__, f"an answer within {_TIMEOUT_S:g} s", fix
                ) from error
        raise LedgerError("the accountant does not stay alive", None, "a running actor", fix)

    def _actor(self) -> Any:
        """The actor of that name, made if need be, on the head node where Ray names one."""
        with contextlib.suppress(ValueError):
            return ray.get_actor(_name(self._url), NAMESPACE)
        on_head = {_HEAD: 0.001} if _HEAD in ray.cluster_resources() else {}
        desk: Any = ray.remote(_Desk)
        placed = desk.options(
            name=_name(self._url), namespace=NAMESPACE, lifetime="detached", get_if_exists=True,
            num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1, resources=on_head,
            scheduling_strategy="DEFAULT",
        )  # fmt: skip
        return placed.remote(self._url, secrets.token_hex(8), self._beat_s)


@contextlib.contextmanager
def accountants(sweep: Sweep) -> Iterator[tuple[Accountant, Accountant | None]]:
    """The accountants of the training records and of private scores, with what the sweep pays for
    registered; released at the end.
    """
    held: list[Accountant] = []

    def take(share: BudgetShare) -> Accountant:
        share.open()
        book = Accountant.start(share.ledger)
        held.append(book)
        (book.ensure_study if isinstance(share.paid, Study) else book.ensure_selection)(share.paid)  # pyright: ignore[reportArgumentType]
        return book

    try:
        yield take(sweep.steps), take(sweep.scores) if sweep.scores else None
    finally:
        for book in held:
            book.release()


def _name(url: str) -> str:
    return f"accountant-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
