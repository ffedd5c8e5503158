"""One candidate in a process of its own: `python -m grape_ray.bench.worker`, spoken to in lines of
JSON.

The first line says what to build: {"setting": {...}, "method": "grape", "rank": 16}. Every later
line asks for one thing and gets one line: {"do": "time", "steps": n} -> {"seconds": a step};
"memory" -> {"peak_bytes": ...}; "phases" -> {"phases": {...}}; "bytes" -> {"bytes": {...}}.
Whatever fails is answered {"error": first line}. Between the lines the process sleeps.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import torch
from torch import Tensor, nn

from grape_ray.bench.candidates import CANDIDATES, Step
from grape_ray.bench.clock import clock
from grape_ray.bench.memory import peak_bytes
from grape_ray.bench.models import Loss, Setting, build, setting
from grape_ray.storage import Json


class Worker:
    """Builds its candidate when it is first asked for a step."""

    def __init__(self, where: Setting, method: str, rank: int | None):
        self.where, self.method, self.rank = where, method, rank
        self._step: Step | None = None

    def _make(self, parts: tuple[nn.Module, Loss, dict[str, Tensor]]) -> Step:
        model, loss, batch = parts
        return CANDIDATES[self.method].make(model, loss, batch, self.rank)

    def step(self) -> Step:
        """The candidate's step."""
        if self._step is None:
            self._step = self._make(build(self.where))
        return self._step

    def time(self, steps: int) -> Json:
        """Mean seconds of a step."""
        step, now = self.step(), clock(self.where.device)
        began = now()
        for _ in range(steps):
            step()
        return {"seconds": (now() - began) / steps}

    def memory(self, steps: int) -> Json:
        """Peak bytes of making the candidate and taking steps, above the model and the batch."""
        small = setting("tiny", device=self.where.device, bf16=self.where.bf16)
        warm = self._make(build(small))
        for _ in range(2):
            warm()
        del warm
        parts = build(self.where)

        def work() -> None:
            step = self._make(parts)
            for _ in range(steps):
                step()

        return {"peak_bytes": peak_bytes(self.where.device, work)}

    def phases(self, steps: int) -> Json:
        """Seconds of a step by phase."""
        from grape_ray.bench.phases import measure_phases

        return {"phases": measure_phases(self.step(), self.where.device, steps)}

    def bytes(self, steps: int) -> Json:
        """What one step holds, by kind."""
        from grape_ray.bench.step_bytes import measure_holdings

        return {"bytes": measure_holdings(self.step())}

    def answer(self, request: Json) -> Json:
        """One request's answer."""
        verbs = {
            "time": self.time,
            "memory": self.memory,
            "phases": self.phases,
            "bytes": self.bytes,
        }
        return verbs[request["do"]](request["steps"])


def first_line(error: BaseException) -> str:
    """The error's kind and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def main() -> None:
    """Serves standard input until it ends; what libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    opening = json.loads(sys.stdin.readline())
    where = Setting(**opening["setting"])
    if where.threads:
        torch.set_num_threads(where.threads)
    worker = Worker(where, opening["method"], opening["rank"])
    for line in sys.stdin:
        try:
            reply = worker.answer(json.loads(line))
        except Exception as error:  # a peer may fail in any way: its row says how
            reply = {"error": first_line(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def opening(where: Setting, method: str, rank: int | None) -> Json:
    """The first line for a worker."""
    return {"setting": dataclasses.asdict(where), "method": method, "rank": rank}


if __name__ == "__main__":
    main()
