"""A chain of entries in a folder: read anew before each decision, and extended by exclusive
creation, so that all writers agree.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from grape_ray.errors import GrapeRayError, LedgerError, StorageError
from grape_ray.ledger.entries import Entry, decode, entry_name
from grape_ray.ledger.state import State
from grape_ray.storage import Json, Storage

_MAX_RACES = 1000
_MOST_AHEAD = 256  # entries asked for at once
_Result = TypeVar("_Result")
# the kind and payload of an entry to be written, or nothing
Wanted = tuple[str, Json] | None


class Chain:
    """The entries, and the state that they lead to; one thread of a process at a time.

    Args:
        storage: the folder.

    Attributes:
        state: what the entries read so far say.
    """

    def __init__(self, storage: Storage):
        self.storage, self.state = storage, State()
        self._lock = threading.Lock()

    def refreshed(self, thorough: bool = False) -> State:
        """The state with the entries that are new, up to the first missing name; ``thorough`` also
        finds a gap.

        Raises:
            LedgerError: out of reach or damaged.
        """
        with self._lock:
            self._refresh(thorough)
            return self.state

    def append(self, decide: Callable[[State], tuple[Wanted, _Result]]) -> _Result:
        """Read what others wrote, decide on it, and write the next entry; begin again when another
        writer was faster.

        Raises:
            GrapeRayError: what ``decide`` raises, or the entry breaks a rule. LedgerError: out of
                reach, damaged, or always outrun.
        """
        with self._lock:
            # decided anew each time: what another wrote may have used up what was to be granted
            for _ in range(_MAX_RACES):
                self._refresh()
                wanted, result = decide(self.state)
                if wanted is None or self._write(*wanted):
                    return result
        raise LedgerError(
            "other writers were always faster",
            _MAX_RACES,
            "fewer tries",
            "let fewer processes charge this ledger",
        )

    def _write(self, kind: str, payload: Json) -> bool:
        """Make the next entry durable, and only then believe it; False when its place was taken."""
        entry = Entry(
            self.state.next_seq, self.state.head, kind, payload, time.time(), os.urandom(8).hex()
        )
        # as a reader will find it: what could not be read back, or breaks a rule, is never written
        self.state.check(decode(entry.name, entry.encode()))
        try:
            self.storage.create(entry.name, entry.encode(), private=True)
        except FileExistsError:
            return False
        except (StorageError, OSError) as error:
            raise _unreachable(self.storage, error) from error
        self.state.apply(entry)
        return True

    def _refresh(self, thorough: bool = False) -> None:
        if self.state.next_seq > 0:
            # a process that lives through a rollback would grant steps a second time
            self._check_head()
        self._extend()
        while thorough and (beyond := self._beyond()):
            # not even now: another writer may have gone on between the two looks
            if not self._extend():
                what = f"ledger entry {entry_name(self.state.next_seq)} is missing"
                raise LedgerError(
                    what, None, f"every entry up to {beyond}", "restore the ledger from a copy"
                )

    def _extend(self) -> bool:
        """Take in the entries that follow; returns whether there were any."""
        before = self.state.next_seq
        for entry in entries(self.storage, before):
            try:
                self.state.apply(entry)
            except GrapeRayError as error:
                fix = "restore the ledger from a copy, and spend nothing from it until then"
                raise LedgerError(
                    f"ledger entry {entry.name} breaks a rule: {error}",
                    None,
                    "entries as they were written",
                    fix,
                ) from error
        return self.state.next_seq > before

    def _check_head(self) -> None:
        """Refuse to continue with a ledger that was removed or rolled back under a living
        process.
        """
        name = entry_name(self.state.next_seq - 1)
        (data,) = _read(self.storage, [name])
        if data is None or decode(name, data).hash != self.state.head:
            what = (
                f"ledger entry {name} was {'removed' if data is None else 'replaced'} under this"
                " process"
            )
            raise LedgerError(what, None, "an append-only ledger", "restore the ledger from a copy")

    def _beyond(self) -> str | None:
        """The last entry beyond the first missing one, if there is any: then an entry was
        removed.
        """
        try:
            found = [
                n
                for n in self.storage.list()
                if n[:8].isdigit() and n[8:] == ".json" and n > entry_name(self.state.next_seq)
            ]
        except (StorageError, OSError) as error:
            raise _unreachable(self.storage, error) from error
        return found[-1] if found else None


def entries(storage: Storage, first: int = 0) -> Iterator[Entry]:
    """The entries from a number on, up to the first missing name; asked for by ones, twos, fours,
    as long as there are more.

    Raises:
        LedgerError: out of reach, or an entry is damaged.
    """
    # mostly there is nothing new, and one question finds that out
    ahead = 1
    while True:
        names = [entry_name(seq) for seq in range(first, first + ahead)]
        for name, data in zip(names, _read(storage, names)):
            if data is None:
                return
            yield decode(name, data)
        first, ahead = first + ahead, min(2 * ahead, _MOST_AHEAD)


def _read(storage: Storage, names: Sequence[str]) -> list[bytes | None]:
    """Entries' files, None where one is missing."""
    try:
        return storage.read_many(names)
    except (StorageError, OSError) as error:
        raise _unreachable(storage, error) from error


def _unreachable(storage: Storage, error: Exception) -> LedgerError:
    """Fail closed."""
    fix = "nothing was granted; check the location and try again"
    return LedgerError(
        f"the ledger {storage.url} cannot be reached", str(error), "storage that can be used", fix
    )
