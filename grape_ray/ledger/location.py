"""Where a user's own files and the ledgers of datasets lie by default."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path

from grape_ray.errors import LedgerError, StorageError
from grape_ray.storage import Storage

SALT_FILE, RUN_FILE = "salt", "run.json"
_SALT_BYTES = 32


def absolute(url: str) -> str:
    """A URL of remote storage as it is; a path, also as a `file://` URL, made absolute, so that
    workers agree on it.
    """
    if "://" not in url or Storage(url).local:
        return str(
            Path(Storage(url).url if "://" in url or not url else url).expanduser().absolute()
        )
    return url.rstrip("/")


def canonical(url: str) -> str:
    """Where a location really is: one text for all ways of writing it, through symbolic links,
    too.
    """
    place = absolute(url)
    if "://" not in place:
        return os.path.realpath(place)
    return Storage(place).url.rstrip("/")


def home() -> Path:
    """The user's own folder of what must not lie among the runs."""
    return (
        Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "grape-ray"
    ).absolute()


def ledger_place(
    asked: str | None, dataset_id: str, public: bool, storage: str, run: str, make: bool = False
) -> str:
    """Where a dataset's ledger lies: where it was asked for, or in one place, so that all runs of a
    user on one dataset share one budget.

    Local runs share a folder of the user's; runs on remote storage share one beside the runs, where
    every machine reaches it. A dataset that is public has nothing to lose, so each of its runs gets
    a ledger of its own, and a demonstration can be repeated at will.

    A run's description names its ledger, and is published, so the folder's name is a keyed hash of
    the data: with a plain one, whoever knows all records but one could confirm the last. The key is
    a file of random bytes beside the ledgers.

    Args:
        make: keep those bytes, where there are none yet. Without it the answer is then a place
            where nothing lies and nothing will: where there is no salt, there is no ledger.

    Raises:
        StorageError: the salt cannot be read or made.
    """
    if asked:
        return absolute(asked)
    if public:
        return f"{storage}/{run}/ledger"
    folder = str(home() / "ledgers") if Storage(storage).local else f"{storage}/ledgers"
    keyed = hmac.new(salt(folder, make), dataset_id.encode(), hashlib.sha256)
    return f"{folder}/{keyed.hexdigest()[:32]}"


def ledger_of(place: str) -> tuple[str, str | None]:
    """(The ledger, the run's name) where a place is a run's folder; otherwise the place itself, and
    None.

    Raises:
        LedgerError: the run has no ledger, as one of method `none`. StorageError: its description
            is damaged, or out of reach.
    """
    try:
        known = json.loads(Storage(place).first_contact().read(RUN_FILE))
        ledger, run = known["ledger"], known["run"]
        if not isinstance(run, str) or not isinstance(ledger, (str, type(None))):
            raise TypeError("a run and its ledger are named by texts")
    except FileNotFoundError:
        return place, None
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise StorageError(
            f"{RUN_FILE} of the run is damaged", place, "its own JSON", "restore it from a copy"
        ) from error
    if ledger is None:
        raise LedgerError(
            "the run has no ledger",
            run,
            "a run with a private method",
            "method none pays for nothing, and guarantees nothing",
        )
    return ledger, run


def salt(folder: str, make: bool) -> bytes:
    """The salt of a folder of private names, or fresh bytes, which are kept if `make`; of two
    makers one wins, and both return its salt.
    """
    place, fresh = Storage(folder).first_contact(), os.urandom(_SALT_BYTES)
    try:
        if make:
            place.create(SALT_FILE, fresh, private=True)
            return fresh
    except FileExistsError:
        pass
    try:
        # whole, if it is there: files are created exclusively and at once
        found = place.read(SALT_FILE)
    except FileNotFoundError:
        return fresh
    if len(found) != _SALT_BYTES:
        fix = "restore it from a copy: without it the ledgers beside it are not found"
        raise StorageError(
            f"the salt of the ledgers in {folder} is damaged",
            f"{len(found)} bytes",
            f"{_SALT_BYTES} bytes",
            fix,
        )
    return found
