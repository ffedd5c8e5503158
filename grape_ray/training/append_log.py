"""A log of lines that one process appends to, on storage that may not be able to append."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import threading
import time
from pathlib import Path

from grape_ray.errors import StorageError
from grape_ray.storage import Storage

_FLUSH_EVERY_S = 1.0
_PART_BYTES = 64 << 10


class AppendLog:
    """Lines in files below a folder, which this process alone writes.

    On a local file system what is flushed is appended, so it is there whatever then happens to the
    process. An object store cannot append: there the newest part is written anew, and a next part
    begins where one is full.

    Args:
        stem: path of the files below `folder`, less `-part-000` and `suffix`.
    """

    def __init__(self, folder: Storage, stem: str, suffix: str = ""):
        self._folder, self._stem, self._suffix = folder, stem, suffix
        self._lock = threading.Lock()
        self._waiting, self._part, self._flushed = b"", 0, b""
        self._descriptor: int | None = None
        self._next_s = 0.0

    def add(self, line: str) -> None:
        """Keeps a line for the next `flush`; touches no storage."""
        with self._lock:
            self._waiting += f"{line}\n".encode()

    def line(self, line: str) -> None:
        """Adds a line and flushes: at once on a local file system, else at most once a second."""
        self.add(line)
        if self._folder.local or time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _FLUSH_EVERY_S
            self.flush()

    def flush(self) -> None:
        """Makes all lines durable. Raises StorageError; then they wait for the next call."""
        with self._lock:
            waiting = self._waiting
        if not waiting:
            return
        if self._folder.local:
            taken = self._append(waiting)
        else:
            self._folder.write(self._name(), self._flushed + waiting)
            self._flushed += waiting
            taken = len(waiting)
            if len(self._flushed) > _PART_BYTES:
                self._part, self._flushed = self._part + 1, b""
        with self._lock:
            # lines that came meanwhile stay
            self._waiting = self._waiting[taken:]

    def close(self) -> None:
        """Flushes; more lines may follow."""
        self.flush()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _name(self) -> str:
        return f"{self._stem}-part-{self._part:03d}{self._suffix}"

    def _append(self, data: bytes) -> int:
        """How many bytes the file took; all of them, unless the disk is full."""
        path = Path(self._folder.url, self._name())
        try:
            if self._descriptor is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            return os.write(self._descriptor, data)
        except OSError as error:
            raise StorageError(
                "a log cannot be written", str(path), "a folder with room", str(error)
            ) from error


def process_log(folder: Storage, kind: str) -> AppendLog:
    """A log of this process alone, below the folder `kind`."""
    return AppendLog(folder, f"{kind}/{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}")


def lines(folder: Storage, kind: str) -> list[str]:
    """The lines of all processes' logs, those of one process in order; a last line that was cut off
    is dropped.
    """
    found: list[str] = []
    for name in folder.list(f"{kind}/"):
        with contextlib.suppress(FileNotFoundError):
            found += folder.read(name).decode().split("\n")[:-1]
    return found
