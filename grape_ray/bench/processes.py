"""Starting a worker and speaking with it; a worker that dies is an answer like any other."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile

from grape_ray.bench.candidates import CANDIDATES
from grape_ray.bench.memory import ALLOCATOR
from grape_ray.bench.models import Setting
from grape_ray.bench.worker import opening
from grape_ray.storage import Json

# Idle threads sleep, so that a process's CPU-seconds are work alone.
_QUIET = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}


class Process:
    """A worker in a fresh process.

    Args:
        for_memory: start it with the allocator's settings of `memory`; they cost time, so never
            time such a process.
    """

    def __init__(self, where: Setting, method: str, rank: int | None, for_memory: bool = False):
        self.error = CANDIDATES[method].missing
        self._child: subprocess.Popen[str] | None = None
        if self.error:
            return
        threads = {"OMP_NUM_THREADS": str(where.threads)} if where.threads else {}
        environment = {**os.environ, **_QUIET, **threads, **(ALLOCATOR if for_memory else {})}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the child)
        command = [sys.executable, "-m", "grape_ray.bench.worker"]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=environment
        )  # fmt: skip
        self._say(opening(where, method, rank))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def ask(self, do: str, steps: int) -> Json:
        """The worker's answer; {"error": ...} from the first failure on."""
        if self.error or self._child is None:
            return {"error": self.error}
        self._say({"do": do, "steps": steps})
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        self.error = answer.get("error", "")
        if self.error:
            self.close()
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self._child is None:
            return
        child, self._child = self._child, None
        for stream in (child.stdin, child.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        child.wait()
        self._log.close()

    def _say(self, message: Json) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its death is reported when it is asked
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()

    def _last_words(self) -> str:
        """Why a worker ended: its status and the last line that it wrote."""
        assert self._child is not None
        status = self._child.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f"the worker ended with status {status}" + (f": {lines[-1]}" if lines else "")
