"""A soak: two workers, an object store that fails, workers and drivers killed on a seeded schedule;
then everything is counted.

`python -m tests.support.soak --seconds 600 --seed 1` prints what happened and, as its last line,
one JSON object; where a guarantee was broken, or fewer faults were injected than asked for, it ends
with status 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grape_ray.ledger.audit import verify
from grape_ray.ledger.charges import Attempt, Charge
from grape_ray.ledger.ledger import Ledger
from tests.support.faulty_s3 import FaultyS3

REPOSITORY = Path(__file__).parents[2]
URL = "s3://bucket/runs"
STEP_S = 0.12


def schedule(seed: int, seconds: float, faults: int) -> list[tuple[float, str]]:
    """When and what: kinds in turn, shuffled, at even distances with a jitter; quiet at the
    beginning and the end.
    """
    source = random.Random(seed)
    kinds = [
        "kill worker",
        "throttle",
        "torn",
        "kill worker",
        "down",
        "lost",
        "kill driver",
        "error",
        "hang",
        "kill worker",
    ]
    chosen = [kinds[i % len(kinds)] for i in range(faults)]
    source.shuffle(chosen)
    distance = (seconds - 60) / faults
    return [(30 + distance * (i + 0.6 * source.random()), kind) for i, kind in enumerate(chosen)]


class Driver:
    """The program that trains, in a process of its own, begun again with `resume` when it was
    killed.
    """

    def __init__(self, folder: Path, environment: dict[str, str], steps: int):
        self._key, self._environment = ["--key-file", str(folder / "key"), "--json"], environment
        self._log = (folder / "driver.log").open("a")
        words = [f"task.witness={folder / 'witness'}", f"task.slow_s={STEP_S}",
        f"privacy.steps={steps}",
                 f"privacy.spare_steps={2 * steps}", "performance.checkpoint_every=20",
                 "performance.charge_chunk=20", "performance.max_failures=60",
                 "performance.eval_every=200", "performance.micro_batch_size=200",
                 "performance.delta_checkpoints=4", "performance.storage_timeout_s=90"]  # fmt: skip
        sets = [w for word in words for w in ("--set", word)]
        self._start(
            [
                "train",
                "tests.support.witness:witnessed",
                "--workers",
                "2",
                "--storage",
                URL,
                "--run",
                "soak",
                *sets,
            ]
        )

    def _start(self, words: list[str]) -> None:
        command = [
            sys.executable,
            "-c",
            "from grape_ray.cli.main import main; main()",
            *words,
            *self._key,
        ]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, **self._environment},
        )

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._start(["resume", f"{URL}/soak", "--trust-module", "tests"])


def witnesses(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines() if path.exists() else []:
        yield json.loads(line)


def inject(kind: str, server: FaultyS3, driver: Driver, folder: Path) -> None:
    """One fault of the schedule."""
    if kind == "kill worker":
        kill_worker(folder / "witness")
    elif kind == "kill driver":
        driver.kill()
    elif kind == "down":
        with server.down():
            time.sleep(20)
    else:
        server.plan(kind, times={"throttle": 12, "torn": 6, "lost": 6, "error": 8, "hang": 2}[kind])


def kill_worker(witness: Path) -> None:
    """Kills the worker that drew the newest noise; while none is there, because they are just being
    started, it waits.
    """
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        newest = collections.deque(witnesses(witness), maxlen=1)
        if newest and time.time() - newest[0]["time"] < 2:
            with contextlib.suppress(ProcessLookupError):
                os.kill(newest[0]["pid"], signal.SIGKILL)
                return
        time.sleep(0.2)
    raise SystemExit("no worker came back")


def soak(seconds: float, seed: int, faults: int, folder: Path) -> dict[str, Any]:
    """Runs it, and returns what was found."""
    server, began = FaultyS3(hang_s=20), time.monotonic()
    steps = int(0.75 * seconds / (STEP_S + 0.02))
    driver, done = Driver(folder, server.environment, steps), []
    for at, kind in schedule(seed, seconds, faults):
        time.sleep(max(0.0, at - (time.monotonic() - began)))
        if driver.process.poll() is not None:
            break
        print(f"{time.monotonic() - began:6.1f} s  {kind}", flush=True)
        (
            threading.Thread(target=inject, args=(kind, server, driver, folder)).start()
            if kind == "down"
            else inject(kind, server, driver, folder)
        )
        done.append(kind)
    output, _ = driver.process.communicate(timeout=3 * seconds)
    if driver.process.returncode != 0:
        raise SystemExit((folder / "driver.log").read_text()[-3000:])
    wall_s = time.monotonic() - began
    os.environ.update(server.environment)
    found = {
        **account(json.loads(output.splitlines()[-1]), folder),
        "wall_s": round(wall_s, 1),
        "faults": dict(collections.Counter(done)),
    }
    server.stop()
    found["wasted_s"] = round(wall_s - found["steps"] * found["step_s"], 1)
    return {
        **found,
        "requests": sum(server.served.values()),
        "requests_failed": sum(server.injected.values()),
    }


def account(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Holds every noise that was drawn against the ledger's charges."""
    lines = list(witnesses(folder / "witness"))
    drawn = collections.Counter((line["key"], line["rank"], line["step"]) for line in lines)
    book = Ledger.open(result["ledger"], create=False)
    tries = book.state.study("soak").runs["soak"]
    unpaid = steps_unpaid(lines, tries)
    executed = len({(key, step) for key, _, step in drawn})
    return {
        "steps": result["steps"], "attempts": len(tries), "executed_steps": executed,
        "repeated_steps": executed - result["steps"], "charged_steps": result["charged_steps"],
        "noises_drawn_twice": sum(n > 1 for n in drawn.values()), "noises_unpaid": unpaid,
        "ledger_ok": verify(result["ledger"]).ok, "epsilon": result["epsilon"],
        "step_s": round(step_seconds(lines), 3),
    }  # fmt: skip


def steps_unpaid(lines: list[dict[str, Any]], tries: list[Attempt]) -> int:
    """Steps whose noise was drawn without a charge.

    A key is fresh, so nothing says whose it was; but attempts follow one another, so each key is
    that of the first attempt, after the one of the key before, whose charges cover what was drawn
    with it. Where none does, its steps are unpaid.
    """
    steps: dict[str, set[int]] = {}
    for line in sorted(lines, key=lambda line: line["time"]):
        steps.setdefault(line["key"], set()).add(line["step"])
    unpaid, place = 0, 0
    for drawn in steps.values():
        paid = (
            n
            for n in range(place, len(tries))
            if drawn <= {s for c in tries[n].charges.values() for s in _of(c)}
        )
        found = next(paid, None)
        unpaid, place = (unpaid + len(drawn), place) if found is None else (unpaid, found + 1)
    return unpaid


def _of(charge: Charge) -> range:
    return range(charge.first_step, charge.first_step + charge.steps)


def step_seconds(lines: list[dict[str, Any]]) -> float:
    """Median time from a step to the next, of rank 0 of all attempts."""
    times = [(line["pid"], line["step"], line["time"]) for line in lines if line["rank"] == 0]
    return statistics.median(
        b[2] - a[2] for a, b in itertools.pairwise(times) if a[0] == b[0] and b[1] == a[1] + 1
    )


def broken(found: dict[str, Any], faults: int) -> list[str]:
    """What a soak found that it must not."""
    wanted = {
        "ledger_ok": True,
        "noises_drawn_twice": 0,
        "noises_unpaid": 0,
        "faults injected": faults,
    }
    got = {**found, "faults injected": sum(found["faults"].values())}
    return [
        f"{name}: got {got[name]}, expected {value}"
        for name, value in wanted.items()
        if got[name] != value
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=660)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        found = soak(given.seconds, given.seed, given.faults, Path(scratch))
    problems = broken(found, given.faults)
    print("\n".join([*problems, json.dumps(found)]))
    sys.exit(bool(problems))
