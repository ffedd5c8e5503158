"""What a run says while it runs, in files of its folder: a journal of events, and its progress."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import threading

from grape_ray.errors import GrapeRayError
from grape_ray.storage import Storage
from grape_ray.training.append_log import AppendLog
from grape_ray.training.progress import Progress

FOLDER, PROGRESS_FILE = "logs", "progress.json"
_WRITE_EVERY_S = 1.0
_CLOSE_S = 10.0


class Journal:
    """Events and progress of one rank in one attempt, written by a thread of its own: no step waits
    for it, and none fails by it.

    An event is one JSON object a line of `logs/attempt-0001-rank-0-part-000.jsonl`. Only what the
    ledger, the checkpoints and public metrics say may be noted: no loss, no norm, no realised batch
    size.

    Args:
        every_s: between two writings.
    """

    def __init__(self, folder: Storage, attempt: int, rank: int, every_s: float = _WRITE_EVERY_S):
        self._folder, self._every_s = folder, every_s
        self._log = AppendLog(folder, f"{FOLDER}/attempt-{attempt:04d}-rank-{rank}", ".jsonl")
        self._always = {
            "attempt": attempt,
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._progress, self._shown = b"", b""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="journal", daemon=True)
        self._thread.start()

    def note(self, event: str, **values: object) -> None:
        """Notes an event with JSON values."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._log.add(json.dumps({"time": now, "event": event, **self._always, **values}))

    def progress(self, progress: Progress, epsilon: float | None) -> None:
        """Shows the newest progress to whoever watches from elsewhere."""
        self._progress = json.dumps({**dataclasses.asdict(progress), "epsilon": epsilon}).encode()

    def close(self) -> None:
        """Writes what is left, if storage lets it soon."""
        self._over.set()
        self._thread.join(_CLOSE_S)

    def _keep_writing(self) -> None:
        while not self._over.wait(self._every_s):
            self._write()
        self._write()
        with contextlib.suppress(GrapeRayError):
            self._log.close()

    def _write(self) -> None:
        progress = self._progress
        with contextlib.suppress(GrapeRayError):
            if progress != self._shown:
                self._folder.write(PROGRESS_FILE, progress)
                self._shown = progress
        with contextlib.suppress(GrapeRayError):
            self._log.flush()
