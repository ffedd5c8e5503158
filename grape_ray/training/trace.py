"""Lines that a process leaves behind even when it is killed: steps taken, scores reported."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import time
from pathlib import Path

from grape_ray.storage import Storage

_FLUSH_S = 1.0


class Trace:
    """A file of lines of this process alone, below a folder.

    On a local file system each line is there once `line` has returned, whatever then happens to the
    process. An object store cannot append: there the file is written anew once a second and by
    `close`, so that a kill loses the last second's lines.
    """

    def __init__(self, folder: Storage, kind: str):
        self._folder = folder
        self._name = f"{kind}/{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._descriptor: int | None = None
        self._text, self._next_s, self._unsaved = "", 0.0, False

    def line(self, text: str) -> None:
        """Adds a line."""
        if self._folder.local:
            os.write(self._opened(), f"{text}\n".encode())
            return
        self._text, self._unsaved = f"{self._text}{text}\n", True
        if time.monotonic() >= self._next_s:
            self._save()

    def close(self) -> None:
        """Makes all lines durable; more may follow."""
        if self._unsaved:
            self._save()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _opened(self) -> int:
        if self._descriptor is None:
            path = Path(self._folder.url, self._name)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        return self._descriptor

    def _save(self) -> None:
        self._next_s, self._unsaved = time.monotonic() + _FLUSH_S, False
        self._folder.write(self._name, self._text.encode())


def lines(folder: Storage, kind: str) -> list[str]:
    """The lines of all processes, those of one process in order; a last line that was cut off is
    left out.
    """
    found: list[str] = []
    for name in folder.list(f"{kind}/"):
        with contextlib.suppress(FileNotFoundError):
            found += folder.read(name).decode().split("\n")[:-1]
    return found
