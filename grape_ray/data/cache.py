"""Prepared sets of this machine, each made once and shared by all processes of its user."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from grape_ray.data.prepared import PreparedSet, open_prepared
from grape_ray.errors import StorageError
from grape_ray.storage import Json

_FORMAT = 2  # of what is in a prepared set; another one is made anew


def cache_folder() -> Path:
    """Where prepared sets lie: `grape-ray` below XDG_CACHE_HOME, or else `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "grape-ray" / "prepared"


def cached(identity: Json, make: Callable[[Path], None]) -> PreparedSet:
    """The prepared set of this identity; whoever asks first makes it, and others wait for it.

    The folder is for its user alone (mode 700): it holds what the records say.

    Args:
        identity: everything that decides what is in it. make: writes it into a folder.

    Raises:
        StorageError: the folder cannot be written. What `make` raises.
    """
    text = json.dumps([_FORMAT, identity], sort_keys=True)
    root = cache_folder()
    place = root / hashlib.sha256(text.encode()).hexdigest()[:32]
    if place.exists():
        return open_prepared(place)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if not place.exists():
                _made(place, make)
    except OSError as error:
        raise StorageError(
            "prepared records cannot be kept",
            str(root),
            "a folder with room that you may write",
            f"set XDG_CACHE_HOME, or free space ({error.strerror or type(error).__name__})",
        ) from error
    return open_prepared(place)


def _made(place: Path, make: Callable[[Path], None]) -> None:
    """Makes a set beside its place and moves it there whole, so that none is ever half there."""
    scratch = Path(tempfile.mkdtemp(prefix="making-", dir=place.parent))
    try:
        make(scratch)
        os.replace(scratch, place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
