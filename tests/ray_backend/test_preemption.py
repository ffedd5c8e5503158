"""Notices of the end: SIGTERM to a worker, a drained node, and a cluster that grows and shrinks
under a run.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from grape_ray import checkpoint
from grape_ray.ledger.audit import verify
from grape_ray.ray_backend.train import train
from grape_ray.storage import Storage
from tests.ray_backend.test_train import executed
from tests.support.tiny import tiny

pytestmark = pytest.mark.ray


def events(folder: Path, rank: int = 0) -> list[dict]:
    """What the journals of a run's attempts say, in order."""
    files = sorted(folder.glob(f"logs/attempt-*-rank-{rank}-part-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_a_worker_that_is_told_to_end_leaves_a_checkpoint_of_its_last_step(tmp_path, ray_cluster):
    trace, told = tmp_path / "trace", []

    def tell_one():
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s and not told:
            told.extend(pid for pid, steps in list(executed(trace).items())[:1] if steps >= 5)
            time.sleep(0.02)
        os.kill(told[0], signal.SIGTERM)

    teller = threading.Thread(target=tell_one)
    teller.start()
    config = tiny(14, trace=str(trace), slow_s=0.1)
    words = [
        "performance.num_workers=2",
        "performance.micro_batch_size=200",
        "performance.checkpoint_every=0",
    ]
    result = train(
        config.override(words),
        run="a",
        storage=str(tmp_path / "runs"),
        key_path=str(tmp_path / "key"),
    )
    teller.join()
    log = events(tmp_path / "runs" / "a")
    first = [e for e in log if e["attempt"] == 1]
    urgent = [e for e in first if e["event"] == "checkpoint begun"]
    assert [e["occasion"] for e in urgent] == ["urgent"]
    assert (
        next(e for e in log if e["attempt"] == 2 and e["event"] == "begun")["step"]
        == urgent[0]["step"]
        >= 5
    )
    assert (result.steps, result.attempts) == (14, 2)
    assert result.executed_steps == 14  # none was lost
    assert result.charged_steps == 14  # and what was paid for and never started was given back
    assert verify(result.ledger).ok
    assert checkpoint.latest(Storage(tmp_path / "runs" / "a")).step == 14


def on_a_changing_cluster(mode: str, tmp_path: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.elastic", mode, str(tmp_path)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] == 400
    assert result["charged_steps"] >= result["executed_steps"] >= 400
    assert verify(result["ledger"]).ok
    return result


@pytest.mark.slow
def test_a_run_grows_and_shrinks_with_its_cluster(tmp_path):
    assert on_a_changing_cluster("grow", tmp_path)["sizes"] == [1, 2, 1]


@pytest.mark.slow
def test_a_drained_node_brings_a_checkpoint_and_the_run_goes_on_without_it(tmp_path):
    assert on_a_changing_cluster("drain", tmp_path)["sizes"] == [2, 1]
    first = [e for e in events(tmp_path / "runs" / "r") if e["attempt"] == 1]
    urgent = [e["step"] for e in first if e.get("occasion") == "urgent"]
    assert len(urgent) == 1
    assert any(e["event"] == "checkpoint committed" and e["step"] == urgent[0] for e in first)


@pytest.mark.slow
def test_figures_reach_prometheus(tmp_path, ray_cluster):
    import ray

    port, seen, over = ray.nodes()[0]["MetricsExportPort"], set(), threading.Event()

    def scrape():
        while not over.wait(1):
            with contextlib.suppress(OSError):
                text = (
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
                    .read()
                    .decode()
                )
                seen.update(
                    line.partition("{")[0]
                    for line in text.splitlines()
                    if line.startswith("ray_grape_")
                )

    thread = threading.Thread(target=scrape)
    thread.start()
    config = tiny(120, slow_s=0.2).override(
        ["performance.num_workers=2", "performance.micro_batch_size=200"]
    )
    train(config, run="a", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    over.set()
    thread.join()
    wanted = {"steps", "epsilon_spent", "tokens_left", "upload_lag_seconds"}
    assert {f"ray_grape_{name}" for name in wanted} <= seen
