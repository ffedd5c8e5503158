"""The client of the ledger actor, and the ledgers that a sweep holds."""

from __future__ import annotations

import contextlib
import secrets
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
from grape_ray.ledger.lease import BEAT_S
from grape_ray.privacy.redaction import text_of
from grape_ray.ray_backend.ledger_actor import find_or_start
from grape_ray.storage import Storage
from grape_ray.tuning.sweep import BudgetShare, Sweep

_TIMEOUT_S = 120.0
_TRIES, _PAUSE_S = 5, 0.5


class LedgerActorClient:
    """The ledger actor's client: a `ledger.interface.LedgerClient` that can be sent to any worker
    of the cluster.

    Guarantees: those of the ledger. A call that meets a dying actor is repeated on its successor.
    Where the actor cannot be had, or cannot reach the ledger, nothing is granted.

    Args:
        url: the ledger's folder, by which the actor is found. beat_s: see Lease.
    """

    def __init__(self, url: str, beat_s: float = BEAT_S):
        self._url, self._beat_s, self._user = url, beat_s, secrets.token_hex(8)
        self._ledger_id, self._head = "", ""

    @classmethod
    def start(cls, url: str, beat_s: float = BEAT_S) -> LedgerActorClient:
        """The client of this cluster's actor for a ledger that exists; to be released.

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
        """(The study, its tokens that are charged)."""
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
                ray.kill(find_or_start(self._url, self._beat_s), no_restart=True)

    def _call(self, method: str, *arguments: object, **named: object) -> Any:
        result, self._head = self._ask("call", method, *arguments, **named)
        return result

    def _ask(self, method: str, *arguments: object, **named: object) -> Any:
        """The actor's answer, or its own error; LedgerError for whatever kept it from answering."""
        fix = "nothing was granted; start the sweep again to resume it"
        for _ in range(_TRIES):
            try:
                actor = find_or_start(self._url, self._beat_s)
                answer = getattr(actor, method).remote(*arguments, **named)
                return ray.get(answer, timeout=_TIMEOUT_S)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, GrapeRayError):
                    raise error.cause from None
                raise LedgerError(
                    "the ledger actor failed", text_of(error.cause), "an answer", fix
                ) from error
            except ray.exceptions.ActorDiedError:
                # ended for good, by another sweep's end or by hand: a new one reads the same ledger
                time.sleep(_PAUSE_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                what = "the ledger actor does not answer"
                raise LedgerError(
                    what, type(error).__name__, f"an answer within {_TIMEOUT_S:g} s", fix
                ) from error
        raise LedgerError("the ledger actor does not stay alive", None, "a running actor", fix)


@contextlib.contextmanager
def open_ledgers(sweep: Sweep) -> Iterator[tuple[LedgerActorClient, LedgerActorClient | None]]:
    """Clients of the ledgers of the training records and of private validation records, with what
    the sweep pays for registered; released at the end.
    """
    held: list[LedgerActorClient] = []

    def take(share: BudgetShare) -> LedgerActorClient:
        # the actor opens what exists and makes nothing, so the ledger is made before it starts
        share.open()
        client = LedgerActorClient.start(share.ledger)
        held.append(client)
        if isinstance(share.paid, Study):
            client.ensure_study(share.paid)
        else:
            client.ensure_selection(share.paid)
        return client

    try:
        yield take(sweep.steps), take(sweep.scores) if sweep.scores else None
    finally:
        # those that were taken before one failed, too
        for client in held:
            client.release()
