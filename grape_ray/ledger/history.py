"""When a study's tokens were spent: its charges and refunds with their times, for plots."""

from __future__ import annotations

from dataclasses import dataclass

from grape_ray.ledger.chain import entries
from grape_ray.storage import Storage


@dataclass(frozen=True)
class Spending:
    """One charge (steps > 0) or refund (steps < 0) of a run; `time` is in seconds since 1970."""

    time: float
    run: str
    attempt: int
    steps: int


def history(url: str, study: str) -> list[Spending]:
    """The charges and refunds of a study, in the ledger's order. Raises LedgerError for a damaged
    entry, or storage out of reach.
    """
    found: list[Spending] = []
    for entry in entries(Storage(url)):
        if entry.kind in ("charge", "refund") and entry.payload["study"] == study:
            steps = entry.payload["steps"] * (1 if entry.kind == "charge" else -1)
            found.append(
                Spending(entry.time, entry.payload["run"], entry.payload["attempt"], steps)
            )
    return found
