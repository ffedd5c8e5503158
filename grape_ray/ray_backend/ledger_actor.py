"""The ledger actor: one named actor of a cluster, which alone writes a ledger."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
from typing import Any

import ray

from grape_ray.errors import LedgerError
from grape_ray.ledger.entries import Study
from grape_ray.ledger.lease import Lease
from grape_ray.ledger.ledger import Ledger
from grape_ray.ray_backend.metrics import StudyGauges
from grape_ray.storage import Storage

NAMESPACE = "grape-ray"
# what workers may ask for: opening, extending and taking over are not
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
_GAUGE_EVERY_S = 3.0
_HEAD = "node:__internal_head__"


class LedgerActor:
    """A thin shell over the ledger. It may die at any moment: what it answered is in the ledger,
    and its calls may be repeated.

    Args:
        url: the ledger's folder. cluster: a name for this cluster, kept when the actor is
            restarted. beat_s: see Lease.
    """

    def __init__(self, url: str, cluster: str, beat_s: float):
        self._url, self._cluster, self._beat_s = url, cluster, beat_s
        self._ledger: Ledger | None = None
        self._lease: Lease | None = None
        self._used: dict[str, tuple[Study, int]] = {}
        self._users: set[str] = set()
        self._gauges = StudyGauges()

    def hold(self, user: str) -> str:
        """Opens the ledger for this cluster alone, and for a sweep of it; returns its id."""
        found = self._open().ledger_id
        self._users.add(user)
        return found

    def call(self, method: str, *arguments: Any, **named: object) -> tuple[object, str]:
        """(What the ledger's method returns, the ledger's head after it)."""
        if method not in _CALLS:
            raise LedgerError(
                "the ledger actor has no such call", method, ", ".join(sorted(_CALLS))
            )
        ledger = self._open()
        result = getattr(ledger, method)(*arguments, **named)
        if method in ("charge", "refund"):
            self._show_tokens(ledger, arguments[0])
        # its whole state would travel to whoever needs to know that it is there
        return None if method == "ensure_study" else result, ledger.head

    def counts(self, study: str) -> tuple[Study, int]:
        """(The study, its tokens that are charged)."""
        known = self._open().state.study(study)
        return known.study, known.used

    def release(self, user: str) -> bool:
        """Lets another cluster have the ledger at once, when no other sweep of this one uses it;
        returns whether that is so.
        """
        self._users.discard(user)
        if self._users:
            return False
        if self._lease is not None:
            self._lease.release()
        self._ledger = self._lease = None
        return True

    def _open(self) -> Ledger:
        """Not in the constructor: an actor whose constructor fails is never restarted, and storage
        may be back in a minute.
        """
        if self._ledger is None:
            ledger = Ledger.open(self._url, create=False)
            lease = Lease(Storage(self._url), self._cluster, self._beat_s)
            lease.take()
            # other than in an earlier life of this actor, which may still be about to write
            ledger.take_over(f"{self._cluster}/{os.getpid()}-{secrets.token_hex(4)}")
            self._ledger, self._lease = ledger, lease
            threading.Thread(target=self._show_epsilon, daemon=True).start()
        return self._ledger

    def _show_tokens(self, ledger: Ledger, study: str) -> None:
        known = ledger.state.study(study)
        self._used[study] = known.study, known.used
        self._gauges.set(ledger.ledger_id, study, steps_charged=known.used, tokens_left=known.left)

    def _show_epsilon(self) -> None:
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


def find_or_start(url: str, beat_s: float) -> Any:
    """The actor of this cluster for a ledger, on the head node where Ray names one."""
    # found by its folder, so that all sweeps of the cluster share one writer
    name = f"ledger-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    with contextlib.suppress(ValueError):
        return ray.get_actor(name, NAMESPACE)
    on_head = {_HEAD: 0.001} if _HEAD in ray.cluster_resources() else {}
    placed = ray.remote(LedgerActor).options(
        # detached: other drivers use it; one call at a time, so that their order is the ledger's
        name=name, namespace=NAMESPACE, lifetime="detached", get_if_exists=True,
        num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1, resources=on_head,
        scheduling_strategy="DEFAULT",
    )  # fmt: skip
    return placed.remote(url, secrets.token_hex(8), beat_s)
