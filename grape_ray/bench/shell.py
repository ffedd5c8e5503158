"""What stands around a step: the program's start, a run's start on Ray, and the loop with its
ledger, journal and reports.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from grape_ray.storage import Json

_QUIET = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}
_PROGRAM = "from grape_ray.cli.main import main; main()"


def help_s(repeats: int = 5) -> float:
    """Median wall-clock seconds of `grape-ray --help`."""
    return statistics.median(_timed("--help")[0] for _ in range(repeats))


def runs(pipeline: str, steps: int, rounds: int) -> Json:
    """The same run in this process alone and on one Ray worker, in turns.

    Returns:
        `step_ratio`: median over rounds of seconds a step on Ray / without. `start_s`: median
            seconds from the program's start to the first
        step, by number of workers.
    """
    ratios, starts = [], {0: [], 1: []}
    for _ in range(rounds):
        speed = {}
        for workers in starts:
            with tempfile.TemporaryDirectory() as folder:
                words = [
                    "train",
                    pipeline,
                    "--workers",
                    str(workers),
                    "--storage",
                    folder,
                    "--key-file",
                    f"{folder}-key",
                    "--json",
                ]
                settings = {
                    "privacy.steps": steps,
                    "performance.eval_every": 0,
                    "performance.checkpoint_every": 0,
                }
                words += [w for key, value in settings.items() for w in ("--set", f"{key}={value}")]
                seconds, out = _timed(*words)
                os.unlink(f"{folder}-key")
            speed[workers] = json.loads(out.splitlines()[-1])["steps_per_s"]
            starts[workers].append(seconds - steps / speed[workers])
        ratios.append(speed[0] / speed[1])
    return {
        "step_ratio": statistics.median(ratios),
        "start_s": {w: statistics.median(s) for w, s in starts.items()},
    }


def _timed(*words: str) -> tuple[float, str]:
    """(wall-clock seconds, what it printed) of the program."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *words],
        capture_output=True,
        text=True,
        env={**os.environ, **_QUIET},
        check=True,
    )
    return time.perf_counter() - began, done.stdout
