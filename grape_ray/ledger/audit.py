"""An audit of a ledger that trusts nothing: every entry, every link, every sum."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass

from grape_ray.accounting import calibration
from grape_ray.errors import GrapeRayError, LedgerError, StorageError
from grape_ray.ledger.entries import Entry, decode, entry_name
from grape_ray.ledger.state import State
from grape_ray.storage import Storage

_ENTRY = re.compile(r"\d{8}\.json")


@dataclass(frozen=True)
class Report:
    """What an audit found: the problems, each naming its entry, and the number and last hash of the
    entries that hold.
    """

    url: str
    problems: tuple[str, ...]
    entries: int
    head: str

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def verify(url: str | os.PathLike[str] | Storage, head: str | None = None) -> Report:
    """Walk the chain, and report what is missing, reordered, edited, overdrawn, or not bought by a
    study's epsilon.

    Entries cut off at the end leave a chain that is whole in itself: only a hash kept elsewhere
    shows that.

    Args:
        url: the ledger's folder.
        head: the hash of an entry, as ``Ledger.head`` once gave it, that must still be there.

    Raises:
        LedgerError: the folder holds no ledger, or cannot be reached.
    """
    storage = url if isinstance(url, Storage) else Storage(url)
    entries, problems = _load(storage)
    problems += _replay(entries)
    if head is not None and head not in {entry.hash for entry in entries.values()}:
        problems.append(
            f"the entry with hash {head[:12]} is gone: the ledger was cut off or replaced"
        )
    last = entries[max(entries)] if entries else None
    return Report(storage.url, tuple(problems), len(entries), last.hash if last else "")


def _load(storage: Storage) -> tuple[dict[int, Entry], list[str]]:
    """The entries that can be read, by the number in their name, and complaints about the
    others.
    """
    try:
        names = [name for name in storage.list() if _ENTRY.fullmatch(name)]
        if not names:
            raise LedgerError(
                "there is no ledger",
                storage.url,
                "a folder with 00000000.json",
                "check the location",
            )
        content = dict(zip(names, storage.read_many(names)))
    except (StorageError, OSError) as error:
        raise LedgerError(
            f"the ledger {storage.url} cannot be reached",
            str(error),
            "storage that can be read",
            "try again",
        ) from error
    entries: dict[int, Entry] = {}
    problems: list[str] = []
    # by all names up to the last, so that a gap is named and not passed over
    for name in (entry_name(seq) for seq in range(int(names[-1][:8]) + 1)):
        data = content.get(name)
        if data is None:
            problems.append(f"{name}: missing")
            continue
        try:
            entries[int(name[:8])] = decode(name, data)
        except LedgerError as error:
            problems.append(f"{name}: {error}")
    return entries, problems


def _replay(entries: dict[int, Entry]) -> list[str]:
    """Apply the entries in order; after a break, continue with the next entry, so that each fault
    is named.
    """
    state, problems = State(), list[str]()
    affords = functools.cache(calibration.affords)  # many studies are alike
    for seq, entry in sorted(entries.items()):
        # the missing entry was named before; its successor's link cannot be checked
        if state.next_seq != seq:
            state.next_seq, state.head = seq, entry.prev
        try:
            state.apply(entry)
        except GrapeRayError as error:
            problems.append(f"{entry.name}: {error}")
            state.next_seq, state.head = seq + 1, entry.hash
            continue
        if entry.kind == "study":
            study = state.studies[entry.payload["name"]].study
            if not affords(study.mechanism, study.tokens, study.epsilon, study.delta):
                problems.append(
                    f"{entry.name}: epsilon {study.epsilon:g} does not buy the {study.tokens} steps"
                    f" of study {study.name!r}"
                )
        if entry.kind == "selection":
            selection = state.selections[entry.payload["name"]]
            if selection.cost() > selection.epsilon:
                problems.append(
                    f"{entry.name}: epsilon {selection.epsilon:g} does not buy selection"
                    f" {selection.name!r}"
                )
    return problems
