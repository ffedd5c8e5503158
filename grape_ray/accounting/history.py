"""When a study's tokens were spent: its charges and refunds with their times, for plots."""

from __future__ import annotations

from dataclasses import dataclass

from grape_ray.accounting.records import decode, entry_name
from grape_ray.storage import Storage


@dataclass(frozen=True)
class Spending:
    """One charge (steps > 0) or refund (steps < 0) of a run; `time` is in seconds since 1970."""

    time: float
    run: str
    attempt: int
    steps: int


def history(url: str, study: str) -> list[Spending]:
    """The charges and refunds of a study, in the ledger's order. Raises LedgerError for a damaged entry."""
    storage, found, seq = Storage(url), [], 0
    while True:
        try:
            entry = decode(entry_name(seq), storage.read(entry_name(seq)))
        except FileNotFoundError:
            return found
        seq += 1
        if entry.kind in ("charge", "refund") and entry.payload["study"] == study:
            steps = entry.payload["steps"] * (1 if entry.kind == "charge" else -1)
            found.append(Spending(entry.time, entry.payload["run"], entry.payload["attempt"], steps))
