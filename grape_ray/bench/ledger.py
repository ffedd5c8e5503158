"""What a ledger costs its reader, against the number of its entries."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from grape_ray.accounting.mechanism import GAUSSIAN, Mechanism
from grape_ray.ledger.audit import verify
from grape_ray.ledger.entries import FORMAT, GENESIS, Entry, Study
from grape_ray.ledger.ledger import Ledger
from grape_ray.storage import Json

_Result = TypeVar("_Result")
_STUDY = Study("study", Mechanism(GAUSSIAN, 1e-3, 2.0), 8.0, 1e-5, 10**6)  # of a million steps


def costs(entries: int) -> Json:
    """CPU-seconds of opening a ledger with that many entries of one study in a local folder, of
    verifying it, and of its epsilon spent.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), entries)
        opened, ledger = _timed(lambda: Ledger.open(folder, create=False))
        verified, report = _timed(lambda: verify(folder))
        spent, _ = _timed(lambda: ledger.epsilon_spent(_STUDY.name))
    assert report.ok
    assert report.entries == entries
    return {"entries": entries, "open_s": opened, "verify_s": verified, "epsilon_spent_s": spent}


def _write(folder: Path, count: int) -> None:
    """A run of one step an entry, written without the syncs that make real entries durable."""
    step = {"study": _STUDY.name, "run": "run", "attempt": 1}
    budget = {"epsilon": _STUDY.epsilon, "delta": _STUDY.delta}
    facts: list[tuple[str, Json]] = [
        ("open", {"format": FORMAT, "ledger_id": "ledger", "dataset_id": "dataset", **budget}),
        ("study", _STUDY.payload()),
        ("attempt", {**step, "key_id": "key"}),
    ]
    head = GENESIS
    for seq in range(count):
        charge = {**step, "chunk": seq, "first_step": seq, "asked": 1, "steps": 1}
        kind, payload = facts[seq] if seq < len(facts) else ("charge", charge)
        entry = Entry(seq, head, kind, payload, time.time(), os.urandom(8).hex())
        (folder / entry.name).write_bytes(entry.encode())
        head = entry.hash


def _timed(call: Callable[[], _Result]) -> tuple[float, _Result]:
    """(CPU-seconds of this process, the result)."""
    began = time.process_time()
    result = call()
    return time.process_time() - began, result
