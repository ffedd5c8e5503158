"""A run in this process that is asked to end: a checkpoint, a clear word, and a resume that loses
nothing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grape_ray import checkpoint
from grape_ray.ledger.audit import verify
from grape_ray.ledger.ledger import Ledger
from grape_ray.storage import Storage

REPOSITORY = Path(__file__).parents[2]


def program(*words: str, **environment: str) -> subprocess.Popen[str]:
    """The program in a process of its own."""
    command = [sys.executable, "-c", "from grape_ray.cli.main import main; main()", *words]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=env
    )


def wait_for_lines(trace: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until that many micro-batches were begun."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s and process.poll() is None:
        if trace.exists() and len(trace.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
    ids=lambda n: n.name,
)
def test_a_signal_brings_a_checkpoint_and_resume_goes_on(tmp_path, number):
    keys = ["--key-file", str(tmp_path / "key")]
    words = [
        "--set",
        "task.slow_s=0.05",
        "--set",
        f"task.trace={tmp_path / 'trace'}",
        "--set",
        "privacy.steps=60",
        "--set",
        "performance.checkpoint_every=0",
        "--run",
        "r",
    ]
    cut = program(
        "train", "tests.support.tiny:tiny", *words, "--storage", str(tmp_path / "runs"), *keys
    )
    wait_for_lines(tmp_path / "trace", 10, cut)
    cut.send_signal(number)
    _, error = cut.communicate(timeout=60)
    assert cut.returncode == 2
    assert "was interrupted" in error.splitlines()[-1]
    assert "grape-ray resume" in error.splitlines()[-1]
    kept = checkpoint.latest(Storage(tmp_path / "runs" / "r"))
    assert 1 <= kept.step < 60
    resumed = program(
        "resume",
        str(tmp_path / "runs" / "r"),
        *keys,
        "--trust-module",
        "tests.support.tiny",
        "--set",
        "performance.eval_every=0",
        "--json",
    )
    output, error = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, error
    assert (
        f"resumes at step {kept.step}: 0 steps that were paid for are taken and paid for again"
        in error
    )
    result = json.loads(output.splitlines()[-1])
    assert (
        result["steps"],
        result["executed_steps"],
        result["charged_steps"],
        result["attempts"],
    ) == (60, 60, 60, 2)
    assert verify(result["ledger"]).ok


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nowhere"], "no run there"),
        (["{run}", "--ledger", "{other}"], "ledger of the run is gone"),
        (["{run}", "--set", "privacy.epsilon=3"], "performance.KEY=VALUE"),
        (["{run}", "--workers", "4:2"], "performance.num_workers"),
    ],
)
def test_what_cannot_be_resumed_is_told(tmp_path, words, part):
    from click.testing import CliRunner

    from grape_ray.cli.main import main

    runner = CliRunner()
    done = runner.invoke(
        main,
        [
            "train",
            "tests.support.tiny:tiny",
            "--run",
            "r",
            "--storage",
            str(tmp_path / "runs"),
            "--key-file",
            str(tmp_path / "key"),
        ],
    )
    assert done.exit_code == 0, done.output
    filled = [w.format(run=tmp_path / "runs" / "r", other=tmp_path / "other") for w in words]
    done = runner.invoke(main, ["resume", *filled, "--key-file", str(tmp_path / "key")])
    assert done.exit_code == 2
    assert part in done.stderr


def test_a_ledger_that_was_moved_is_found_and_an_old_copy_is_refused(tmp_path):
    import shutil

    from grape_ray.errors import LedgerError
    from grape_ray.ray_backend.train import run_plan, train
    from grape_ray.training.resume import plan_resume
    from tests.support.tiny import tiny

    key = str(tmp_path / "key")
    train(tiny(), run="r", storage=str(tmp_path / "runs"), key_path=key)
    ledger, run = tmp_path / "runs" / "r" / "ledger", str(tmp_path / "runs" / "r")
    shutil.copytree(ledger, tmp_path / "old")
    for entry in sorted((tmp_path / "old").glob("*.json"))[-3:]:
        entry.unlink()
    with pytest.raises(LedgerError, match="not the one that the run was charged to"):
        plan_resume(run, ledger=str(tmp_path / "old"), key_path=key)
    ledger.rename(tmp_path / "moved")
    with pytest.raises(LedgerError, match="gone"):
        plan_resume(run, key_path=key)
    result = run_plan(plan_resume(run, ledger=str(tmp_path / "moved"), key_path=key))
    assert result.ledger == str(tmp_path / "moved")
    assert result.charged_steps == 12  # it was done already
    assert run_plan(plan_resume(run, key_path=key)).ledger == str(tmp_path / "moved")


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path):
    words = [
        "--set",
        "task.slow_s=1.5",
        "--set",
        f"task.trace={tmp_path / 'trace'}",
        "--run",
        "r",
        "--no-dry-run",
    ]
    cut = program(
        "train",
        "tests.support.tiny:tiny",
        *words,
        "--storage",
        str(tmp_path / "runs"),
        "--key-file",
        str(tmp_path / "key"),
    )
    wait_for_lines(tmp_path / "trace", 6, cut)
    for _ in range(2):
        cut.send_signal(signal.SIGINT)
        time.sleep(0.5)
    cut.communicate(timeout=20)
    assert cut.returncode == 1
    assert checkpoint.latest(Storage(tmp_path / "runs" / "r")) is None


@pytest.mark.ray
@pytest.mark.slow
def test_one_interrupt_ends_two_workers_in_good_order(tmp_path):
    folder, key = tmp_path / "runs" / "r", str(tmp_path / "key")
    words = [
        "--set",
        "task.slow_s=0.05",
        "--set",
        f"task.trace={tmp_path / 'trace'}",
        "--set",
        "privacy.steps=300",
        "--workers",
        "2",
    ]
    words += [
        "--set",
        "performance.checkpoint_every=0",
        "--run",
        "r",
        "--storage",
        str(tmp_path / "runs"),
        "--key-file",
        key,
    ]
    cut = program("train", "tests.support.tiny:tiny", *words)
    wait_for_lines(tmp_path / "trace", 40, cut)
    cut.send_signal(signal.SIGINT)
    _, error = cut.communicate(timeout=60)
    assert cut.returncode == 2, error
    kept = checkpoint.latest(Storage(folder))
    assert (
        f"run r was interrupted, and is kept at step {kept.step}; run `grape-ray resume {folder}"
        in error.splitlines()[-1]
    )
    assert 1 <= kept.step < 300
    assert sum(t.used for t in Ledger.open(str(folder / "ledger")).attempts("r", "r")) == kept.step
