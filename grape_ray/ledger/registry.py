"""Which ledgers pay for which datasets, as far as this user knows, so that no dataset gets a second
budget unawares.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
from collections.abc import Iterable
from dataclasses import dataclass

from grape_ray.errors import LedgerError, StorageError
from grape_ray.ledger.entries import decode, entry_name
from grape_ray.ledger.location import SALT_FILE, canonical, home, salt
from grape_ray.storage import Storage

_FOLDER = "datasets"


@dataclass(frozen=True)
class Known:
    """A ledger that was opened before. `place`: where it really was. `ledger_id`: its random name.
    `dataset`: in the user's words.
    """

    place: str
    ledger_id: str
    dataset: str = ""


def known(identity: Iterable[str]) -> list[Known]:
    """The ledgers of all datasets that share a fingerprint with `identity` (`task.Data.identity`).

    Raises:
        StorageError: the user's registry cannot be read.
    """
    names = set(_names(identity))
    return [known for known, theirs in _entries() if names & theirs]


def ledgers() -> list[Known]:
    """All ledgers, each once, in the order of their places.

    Raises:
        StorageError: the user's registry cannot be read.
    """
    found: dict[tuple[str, str], Known] = {}
    for entry, _ in _entries():
        key = (entry.place, entry.ledger_id)
        # of several entries that in which the user gave the records a name
        found[key] = max(found.get(key, entry), entry, key=lambda one: one.dataset)
    return [found[key] for key in sorted(found)]


def _entries() -> list[tuple[Known, set[str]]]:
    """The ledgers, and the salted names of the records that each pays for."""
    folder = _folder()
    files = folder.list()
    fix = "restore it from a copy: without it a second budget is not noticed"
    if files and SALT_FILE not in files:
        raise StorageError(
            "the registry of ledgers is damaged",
            folder.url,
            f"the file {SALT_FILE} beside its entries",
            fix,
        )
    try:
        entries = [json.loads(folder.read(name)) for name in files if name.endswith(".json")]
        return [
            (
                Known(entry["ledger"], entry["ledger_id"], entry.get("dataset", "")),
                set(entry["names"]),
            )
            for entry in entries
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            "the registry of ledgers is damaged", folder.url, "its own JSON files", fix
        ) from error


def register(identity: Iterable[str], ledger: str, ledger_id: str, dataset: str = "") -> None:
    """Notes that a ledger pays for a dataset, by salted names, in a file that only the user may
    read.

    Args:
        dataset: what the user calls the records, such as a task's name and the path of a table, for
            lists.

    Raises:
        StorageError: the user's registry cannot be written.
    """
    place = canonical(ledger)
    entry = {
        "ledger": place,
        "ledger_id": ledger_id,
        "names": sorted(set(_names(identity, make=True))),
    }
    # the same registration again is the same file
    name = f"{hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:32]}.json"
    _folder().write(name, json.dumps({**entry, "dataset": dataset}).encode(), private=True)


def check_only(place: str, identity: Iterable[str], second: bool) -> None:
    """Refuses a ledger where the dataset, or one with columns of it, is known to be paid for by
    another: that would be a second budget.

    Locations are compared by where they really are. A ledger that was moved whole is the same one;
    a copy beside it, or a new one in its place, is not.

    Args:
        second: whether the user has said that a second ledger, with a budget of its own, is wanted.

    Raises:
        LedgerError: which ledger the dataset has. StorageError: see `known`.
    """
    entries = [] if second else known(identity)
    if not entries or any(_is(entry, place) for entry in entries):
        return
    got, expected = place, f"the ledger at {entries[0].place}"
    fix = (
        "charge that one (--ledger), or say --second-ledger (second_ledger=True) and add the two"
        " budgets up yourself"
    )
    if any(entry.place == canonical(place) for entry in entries):
        fix = f"restore it, or {fix.partition(', or ')[2]}"
        raise LedgerError(
            "the ledger of these records was removed or replaced",
            got,
            "the ledger that they were charged to",
            fix,
        )
    raise LedgerError(
        "these records, or columns of them, are paid for by another ledger already",
        got,
        expected,
        fix,
    )


def _is(entry: Known, place: str) -> bool:
    """Whether the ledger at `place` is the known one, in its place or moved from it."""
    if _ledger_id(place) != entry.ledger_id:
        return False
    return entry.place == canonical(place) or _ledger_id(entry.place) != entry.ledger_id


def _ledger_id(place: str) -> str | None:
    """The random name of the ledger there, or None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        name = entry_name(0)
        return decode(name, Storage(place).first_contact().read(name)).payload["ledger_id"]
    return None


def _folder() -> Storage:
    return Storage(home() / _FOLDER)


def _names(identity: Iterable[str], make: bool = False) -> list[str]:
    """Keyed hashes: whoever reads the registry alone can confirm no record with it."""
    key = salt(str(home() / _FOLDER), make)
    return [hmac.new(key, text.encode(), hashlib.sha256).hexdigest()[:32] for text in identity]
