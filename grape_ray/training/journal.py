"""What a run says of itself while it runs: a journal of events and the newest progress, in small
files of its folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import threading
from typing import Any

from grape_ray.errors import GrapeRayError
from grape_ray.storage import Storage
from grape_ray.training.loop import Progress
from grape_ray.training.plan import PROGRESS_FILE

FOLDER = "logs"
_WRITE_EVERY_S = 1.0
_LAST_WORDS_S = 10.0
_PART_BYTES = 64 << 10


class Journal:
    """Events and progress of one rank in one attempt, written by a thread of its own: no step waits
    for it, and none fails by it.

    An event is one JSON object a line of `logs/attempt-0001-rank-0-part-000.jsonl` and further
    parts: object stores cannot append, so the newest part is written anew, at most once a second.
    Only what the ledger, the checkpoints and public metrics say may be noted: no loss, no norm, no
    realised batch size.

    Args:
        every_s: between two writings.
    """

    def __init__(self, folder: Storage, attempt: int, rank: int, every_s: float = _WRITE_EVERY_S):
        self._folder = folder
        self._name = f"{FOLDER}/attempt-{attempt:04d}-rank-{rank}"
        self._every_s = every_s
        self._always = {
            "attempt": attempt,
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._lines: list[str] = []
        self._progress = b""
        self._part, self._written, self._shown = 0, 0, b""
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="journal", daemon=True)
        self._thread.start()

    def note(self, event: str, **facts: Any) -> None:
        """Notes an event with JSON values."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        with self._lock:
            self._lines.append(
                json.dumps({"time": now, "event": event, **self._always, **facts}) + "\n"
            )

    def progress(self, progress: Progress, epsilon: float | None) -> None:
        """Shows the newest progress to who watches from elsewhere."""
        self._progress = json.dumps({**dataclasses.asdict(progress), "epsilon": epsilon}).encode()

    def close(self) -> None:
        """Writes what is left, if storage lets it soon."""
        self._over.set()
        self._thread.join(_LAST_WORDS_S)

    def _keep_writing(self) -> None:
        while not self._over.wait(self._every_s):
            self._write()
        self._write()

    def _write(self) -> None:
        with self._lock:
            count, text, progress = len(self._lines), "".join(self._lines).encode(), self._progress
        with contextlib.suppress(GrapeRayError):
            if progress != self._shown:
                self._folder.write(PROGRESS_FILE, progress)
                self._shown = progress
            if count > self._written:
                self._folder.write(f"{self._name}-part-{self._part:03d}.jsonl", text)
                self._written = count
        if self._written == count and len(text) > _PART_BYTES:
            with self._lock:
                self._lines = self._lines[count:]
            self._part, self._written = self._part + 1, 0
