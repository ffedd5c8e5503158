"""Sweeps whose processes are killed at random moments: what was executed was paid for, and little
more.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from grape_ray.ledger import Ledger, verify
from grape_ray.storage import Storage
from grape_ray.tuning import folder

pytestmark = pytest.mark.ray
REPOSITORY = Path(__file__).parents[2]
CHUNK = 3  # of tests.support.tiny_space
TITLES = {"accountant": "ray::LedgerActor", "trial": "ray::Trial", "worker": "ray::RayTrainWorker"}


class Prey:
    """A sweep in processes of its own, which can be found by a word in their environment, and
    killed.

    Everything that is killed was started here.
    """

    def __init__(self, tmp_path, *words):
        self.place, self.token, self.words = tmp_path, uuid.uuid4().hex, words
        self.sweep = Storage(tmp_path / "sweeps").child("c")
        self.killed: list[str] = []

    def start(self, *words):
        command = [
            "tune",
            "tests.support.tiny_space",
            "--storage",
            str(self.place / "sweeps"),
            "--key-file",
            str(self.place / "key"),
            "--json",
        ]
        environment = {**os.environ, "GRAPE_RAY_TEST_TOKEN": self.token, "TINY_SLOW_S": "0.05"}
        self.driver = subprocess.Popen(
            [sys.executable, "-c", "from grape_ray.cli.main import main; main()", *command, *words],
            cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def executed(self):
        """Steps taken so far, over all processes."""
        try:
            return sum(
                len(self.sweep.read(name).splitlines())
                for name in self.sweep.list(f"{folder.RUNS}/")
                if f"/{folder.EXECUTED}/" in name
            )
        except FileNotFoundError:
            return 0

    def processes(self, title=""):
        """Ids of this sweep's processes whose command line begins with the title."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.token.encode() in (entry / "environ").read_bytes() and (
                    entry / "cmdline"
                ).read_text().startswith(title):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def kill(self, kind, after, chance):
        """Kills a process of a kind once so many steps were taken, if the sweep has not ended by
        then.
        """
        deadline_s = time.monotonic() + 300
        while self.driver.poll() is None and time.monotonic() < deadline_s:
            victims = [self.driver.pid] if kind == "driver" else self.processes(TITLES[kind])
            if self.executed() >= after and victims:
                time.sleep(chance.uniform(0, 0.3))
                try:
                    os.kill(chance.choice(victims), signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.killed.append(kind)
                return
            time.sleep(0.05)

    def finish(self):
        """Resumes a sweep whose driver is gone, and returns the result."""
        for _ in range(3):
            out, err = self.driver.communicate(timeout=300)
            if self.driver.returncode == 0:
                return json.loads(out.splitlines()[-1])
            assert self.driver.returncode == -signal.SIGKILL, err
            begun = self.sweep.exists(folder.SWEEP_FILE)
            self.start(*(("--resume", "c") if begun else self.words))
        raise AssertionError("the sweep did not end")

    def clear(self):
        """Ends whatever a failed test left."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)


def survive(tmp_path, seed, kinds, *words):
    """Runs a sweep, kills a process of each kind at random moments, and holds the ledger against
    what was executed.
    """
    chance = random.Random(seed)
    prey = Prey(tmp_path, "--name", "c", "--seed", str(seed), *words)
    try:
        prey.start(*prey.words)
        for kind in kinds:
            prey.kill(kind, prey.executed() + chance.randint(1, 10), chance)
        result = prey.finish()
    finally:
        prey.clear()
    assert prey.killed
    report = verify(result["ledger"])
    assert report.ok, report.problems
    attempts = [
        a
        for tries in Ledger.open(result["ledger"], create=False).state.study("c").runs.values()
        for a in tries
    ]
    wasted = result["tokens_charged"] - result["steps_executed"]
    cut_off = sum(not attempt.closed for attempt in attempts)
    assert 0 <= wasted <= CHUNK * cut_off
    assert result["tokens_charged"] == sum(a.used for a in attempts) <= result["tokens_total"]
    assert result["best"] is not None
    for name in prey.sweep.list(f"{folder.RUNS}/"):
        # of one process, and so of one attempt: no step was taken twice with its key
        if f"/{folder.EXECUTED}/" in name:
            steps = [int(line) for line in prey.sweep.read(name).split()]
            assert steps == sorted(set(steps))
    print(json.dumps({"seed": seed, "killed": prey.killed, "charged": result["tokens_charged"],
    "executed": result["steps_executed"],
                      "wasted": wasted, "cut_off": cut_off}))  # fmt: skip
    return result, prey


@pytest.mark.slow
def test_a_sweep_outlives_its_ledger_actor_a_trial_and_its_driver(tmp_path):
    # so many trials that the sweep has not ended before its driver's turn, on a slow machine either
    _, prey = survive(
        tmp_path, 1, ["accountant", "trial", "driver"], "--trials", "6", "--scheduler", "none"
    )
    assert prey.killed == ["accountant", "trial", "driver"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_chaos(tmp_path, seed):
    if seed % 5 == 4:
        kinds = [["worker"], ["trial"], ["accountant"], ["driver"]][seed // 5]
        survive(
            tmp_path,
            seed,
            kinds,
            "--trials",
            "2",
            "--workers",
            "1",
            "--concurrent",
            "1",
            "--scheduler",
            "none",
        )
    else:
        kinds = random.Random(seed).choices(["accountant", "trial", "driver"], k=1 + seed % 2)
        survive(
            tmp_path,
            seed,
            kinds,
            "--trials",
            "5",
            "--scheduler",
            ["asha", "none", "median", "pbt"][seed % 4],
        )
