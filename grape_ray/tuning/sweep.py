"""A sweep that was checked and priced, and the budget shares that pay for it."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field

from grape_ray.accounting.selection import Selection
from grape_ray.config.description import describe
from grape_ray.config.trust import remember_sweep
from grape_ray.ledger import registry
from grape_ray.ledger.budget import check_share, open_registered
from grape_ray.ledger.entries import Study, entry_name
from grape_ray.storage import Json, Storage
from grape_ray.training.private_scores import Terms
from grape_ray.tuning.folder import SWEEP_FILE
from grape_ray.tuning.options import Options
from grape_ray.tuning.spaces import Space, SweepStudy


@dataclass(frozen=True)
class BudgetShare:
    """A study or selection, and the ledger of the records that pay for it.

    Attributes:
        paid: what is registered there. ledger: URL. dataset_id: of the records. budget: (epsilon,
            delta) of the records, where the ledger is made; asked: as the user named it, with which
            an existing ledger is compared. identity: all fingerprints of the records. public:
            whether they are, so that there may be many ledgers. dataset: what the user calls them.
    """

    paid: Study | Selection
    ledger: str
    dataset_id: str
    budget: tuple[float, float]
    identity: tuple[str, ...] = field(default=(), compare=False)
    public: bool = field(default=False, compare=False)
    asked: tuple[float | None, float | None] = field(default=(None, None), compare=False)
    dataset: str = field(default="", compare=False)

    def check(self, second: bool) -> None:
        """Refuses, before any work, what the ledger would refuse, and a second one. Raises
        StorageError, BudgetExceeded, LedgerError.
        """
        registry.check_only(self.ledger, self.identity, second)
        check_share(
            Storage(self.ledger).first_contact(),
            self.dataset_id,
            self.budget,
            self.paid,
            self.asked,
        )

    def open(self) -> None:
        """Makes the ledger where there is none."""
        storage = Storage(self.ledger)
        made = (None, None) if storage.exists(entry_name(0)) else self.budget
        identity = () if self.public else self.identity
        open_registered(storage, self.dataset_id, made, self.paid.unit, identity, self.dataset)

    def described(self) -> Json:
        """The share as the sweep's description keeps it: without the fingerprint of the records,
        which the ledger knows.
        """
        return {"paid": self.paid.payload(), "ledger": self.ledger, "budget": list(self.budget)}


@dataclass(frozen=True)
class Sweep:
    """A sweep that may begin.

    Attributes:
        name: of its folder below storage, and of its study. options: as asked. study: its config as
            every trial begins from it.
        storage: URL of the folder of sweeps. steps: what pays for training steps; scores: for
            private scores, or None.
        sealed: URL of the folder of secrets in mode select; None otherwise. existing: whether it is
            resumed.
    """

    name: str
    options: Options
    space: Space
    study: SweepStudy
    storage: str
    steps: BudgetShare
    scores: BudgetShare | None
    sealed: str | None
    existing: bool

    def folder(self) -> Storage:
        """The sweep's own folder."""
        return Storage(self.storage).child(self.name)

    def terms(self) -> Terms | None:
        """What may be released about private validation records; None where they are public."""
        if self.scores is None:
            return None
        return Terms(
            self.study.metric,
            self.scores.paid.mechanism.noise_multiplier,
            self.scores.ledger,
            self.scores.paid.name,
        )

    def register(self) -> None:
        """Keeps the description of the sweep, from which it is resumed and reported."""
        if not self.existing:
            mark = secrets.token_hex(16)
            self.folder().create(
                SWEEP_FILE, json.dumps(self._description(mark), indent=1, sort_keys=True).encode()
            )
            remember_sweep(self.folder().url, mark)

    def _description(self, mark: str) -> Json:
        return {
            "sweep": self.name,
            "mark": mark,
            "study": self.steps.paid.name,
            "mode": self.options.mode,
            "options": self.options.as_json(),
            "fields": sorted(self.space),
            "metric": self.study.metric,
            "score_source": self.study.score_source,
            "config": describe(self.study.config),
            **self.steps.described(),
            "sealed": self.sealed,
            "scores": self.scores and self.scores.described(),
            "time": time.time(),
        }
