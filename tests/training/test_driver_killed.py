"""A driver killed without warning at random moments: `grape-ray resume` completes every run, and
repeats no more than it must.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from grape_ray.ledger.audit import verify
from tests.ray_backend.test_train import processes_with
from tests.support.soak import witnesses

REPOSITORY = Path(__file__).parents[2]
EVERY, STEPS = 5, 60


def program(*words: str, token: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from grape_ray.cli.main import main; main()", *words]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "GRAPE_RAY_TEST_TOKEN": token}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=env
    )


def steps_by_key(witness: Path) -> Iterator[list[int]]:
    """The steps whose noise each attempt drew on rank 0, attempt after attempt."""
    found: dict[str, list[int]] = {}
    for line in witnesses(witness):
        if line["rank"] == 0:
            found.setdefault(line["key"], []).append(line["step"])
    yield from found.values()


def killed_and_resumed(
    folder: Path, workers: int, after_steps: int, after_s: float, step_s: float
) -> dict:
    """A run whose driver is killed `after_s` after it drew so many noises; what the resume says,
    and `lost_steps`.
    """
    keys, token = ["--key-file", str(folder / "key")], uuid.uuid4().hex
    words = [f"task.witness={folder / 'witness'}", f"task.slow_s={step_s}",
    f"privacy.steps={STEPS}", f"privacy.spare_steps={STEPS}",
             f"performance.checkpoint_every={EVERY}", "performance.micro_batch_size=200",
             "performance.charge_chunk=4"]  # fmt: skip
    sets = [w for word in words for w in ("--set", word)]
    storage = ["--storage", str(folder / "runs"), "--run", "r", "--workers", str(workers)]
    driver = program(
        "train", "tests.support.witness:witnessed", *storage, *sets, *keys, token=token
    )
    deadline_s = time.monotonic() + 300
    while not (folder / "runs" / "r" / "run.json").exists() or sum(
        1 for _ in witnesses(folder / "witness")
    ) < after_steps * (workers or 1):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    time.sleep(after_s)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    if workers:
        deadline_s = time.monotonic() + 60
        while left := [
            pid for pid, command in processes_with(token).items() if "RayTrainWorker" in command
        ]:
            assert time.monotonic() < deadline_s, left
            time.sleep(0.2)
        for pid in processes_with(token):  # an agent of Ray's may outlive its cluster
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    before = list(steps_by_key(folder / "witness"))
    resumed = program(
        "resume", str(folder / "runs" / "r"), *keys, "--trust-module", "tests", "--json"
    )
    output, error = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, error[-2000:]
    result = json.loads(output.splitlines()[-1])
    after = list(steps_by_key(folder / "witness"))
    # no noise was drawn twice under one key
    assert all(len(set(steps)) == len(steps) for steps in after)
    taken = max(before[-1]) + 1 if before else 0
    first = after[-1][0] if len(after) > len(before) else taken
    assert verify(result["ledger"]).ok
    assert result["charged_steps"] >= sum(map(len, after)) >= STEPS
    return {**result, "taken": taken, "lost_steps": taken - first}


@pytest.mark.parametrize("after_steps", [23, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_driver_is_resumed(tmp_path, after_steps):
    result = killed_and_resumed(tmp_path, 0, after_steps, 0.03, 0.06)
    assert result["steps"] == STEPS
    assert result["lost_steps"] <= EVERY


@pytest.mark.slow
@pytest.mark.ray
def test_ten_drivers_killed_at_random_moments_are_ten_runs_completed(tmp_path):
    source, found = random.Random(7), []
    for index in range(10):
        folder = tmp_path / str(index)
        folder.mkdir()
        after_steps, after_s = source.randrange(STEPS - 4), source.uniform(0, 0.3)
        result = killed_and_resumed(folder, 2, after_steps, after_s, 0.12)
        found.append((after_steps, result["taken"], result["lost_steps"], result["steps"]))
        print(found[-1], flush=True)
    assert [f[3] for f in found] == [STEPS] * 10
    assert max(f[2] for f in found) <= EVERY
