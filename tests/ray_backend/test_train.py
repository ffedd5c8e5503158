"""Runs on real Ray Train workers: the same result as in one process, a killed worker, the budget's
end, a cluster too small.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grape_ray import checkpoint
from grape_ray.errors import GrapeRayError
from grape_ray.ledger.audit import verify
from grape_ray.ray_backend.train import train
from grape_ray.ray_backend.trainer import WorkersFailed
from grape_ray.storage import Storage
from tests.support.quoting import RECORD, Quoting
from tests.support.tiny import tiny

pytestmark = pytest.mark.ray
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, ray_cluster):
    def go(config, *assignments, **options):
        config = config.override(
            ["performance.num_workers=2", "performance.micro_batch_size=200", *assignments]
        )
        return train(
            config, storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"), **options
        )

    return go


def weights(tmp_path, name):
    found = checkpoint.latest(Storage(tmp_path / "runs" / name))
    assert found is not None
    return found.model


def executed(trace: Path) -> dict[int, int]:
    """Process -> steps it has begun, in order of appearance; each step is one micro-batch on each
    rank.
    """
    counts: dict[int, int] = {}
    for line in trace.read_text().splitlines() if trace.exists() else []:
        pid = json.loads(line)["pid"]
        if pid != os.getpid():  # the preflight in this process
            counts[pid] = counts.get(pid, 0) + 1
    return counts


def test_two_workers_train_what_one_process_trains(run, tmp_path):
    # by units of several records, which are shared out whole
    words = ["method.name=none", "privacy.unit=user", "privacy.expected_batch_size=20"]
    run(tiny(), *words, run="two")
    run(tiny(), *words, "performance.num_workers=0", run="one")
    one, two = weights(tmp_path, "one"), weights(tmp_path, "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)


def test_a_killed_worker_costs_a_new_attempt_and_its_steps(run, tmp_path):
    trace, killed = tmp_path / "trace", []

    def kill_one():
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s and not killed:
            victims = [pid for pid, steps in executed(trace).items() if steps >= 7]
            # something to go on from
            if victims and list((tmp_path / "runs" / "a" / "checkpoints").glob("*/manifest.json")):
                os.kill(victims[0], signal.SIGKILL)
                killed.append(victims[0])
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one)
    killer.start()
    result = run(tiny(20, trace=str(trace), slow_s=0.15), run="a")
    killer.join()
    counts = list(executed(trace).values())
    taken = [max(counts[i : i + 2]) for i in range(0, len(counts), 2)]  # two processes an attempt
    assert len(killed) == 1
    assert len(taken) == result.attempts == 2
    assert result.steps == 20
    assert taken[0] < 20
    assert taken[1] < 20  # it went on from a checkpoint
    assert result.charged_steps >= sum(taken) >= 20
    assert result.charged_steps >= result.executed_steps == 20
    report = verify(result.ledger)
    assert report.ok, report.problems


@pytest.mark.slow
def test_the_end_of_the_budget_is_a_clean_end_and_a_resume_keeps_what_is_there(run, tmp_path):
    seen = []
    words = [
        "privacy.noise_multiplier=2.0",
        "privacy.epsilon=4.0",
        "performance.keep_checkpoints=1",
    ]
    result = run(
        tiny(500),
        *words,
        run="a",
        on_progress=lambda progress, epsilon: seen.append((progress.step, epsilon)),
    )
    assert result.exhausted
    assert 0 < result.steps == result.charged_steps < 500
    assert result.attempts == 1
    assert result.epsilon_spent <= result.epsilon == 4.0
    assert seen[-1] == (result.steps, result.epsilon_spent)
    before = weights(tmp_path, "a")
    again = run(tiny(500), *words, run="a")
    assert (again.steps, again.charged_steps, again.attempts) == (result.steps, result.steps, 2)
    assert again.checkpoint == result.checkpoint
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path, "a").items())
    assert len(list((tmp_path / "runs" / "a" / "checkpoints").iterdir())) == 1


def test_a_cluster_too_small_is_told_in_time(run, tmp_path):
    began = time.monotonic()
    with pytest.raises(GrapeRayError, match=r"no workers within 4 s.*64 workers with a CPU each"):
        run(tiny(), "performance.num_workers=64", "performance.start_timeout_s=4", run="a")
    assert time.monotonic() - began < 60
    assert not (tmp_path / "runs" / "a" / "result.json").exists()


def test_a_local_cluster_listens_on_the_loopback_interface_alone(ray_cluster):
    import ray

    address = ray.get_runtime_context().gcs_address
    assert address.startswith("127.0.0.1:")
    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}


@pytest.mark.slow
def test_the_program_leaves_no_process_behind(tmp_path):
    token = uuid.uuid4().hex
    words = [
        "train",
        "tests.support.tiny:tiny",
        "--workers",
        "2",
        "--storage",
        str(tmp_path / "runs"),
        "--key-file",
        str(tmp_path / "key"),
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "from grape_ray.cli.main import main; main()", *words],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=180,
        env={**os.environ, "GRAPE_RAY_TEST_TOKEN": token}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 12
    deadline_s = time.monotonic() + 15
    while left := processes_with(token):
        assert time.monotonic() < deadline_s, left
        time.sleep(0.2)


def processes_with(token: str) -> dict[int, str]:
    """Process id -> command line of the processes that have the token in their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def test_workers_write_no_text_of_the_tasks_errors_anywhere(tmp_path, ray_cluster):
    config = replace(tiny(), task=Quoting()).override(
        ["performance.num_workers=2", "performance.max_failures=0"]
    )
    with pytest.raises(WorkersFailed, match=r"the task failed with ValueError.*quoting") as caught:
        train(config, run="r", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    assert RECORD not in str(caught.value)
    assert [
        path
        for path in (tmp_path / "runs").rglob("*")
        if path.is_file() and RECORD.encode() in path.read_bytes()
    ] == []
