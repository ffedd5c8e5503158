"""Whole sweeps on real Ray Tune: all that is executed is paid for, the budget ends them cleanly,
and a selection shows its winner alone.
"""

import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from grape_ray import checkpoint
from grape_ray.cli.main import main
from grape_ray.errors import BudgetExceeded, ConfigError, LedgerError, TaskFailed
from grape_ray.ledger import Ledger, verify
from grape_ray.ray_backend.sweep import resume, run
from grape_ray.storage import Storage
from grape_ray.tuning.options import Options
from grape_ray.tuning.page import report
from grape_ray.tuning.results import SweepResult
from tests.support.bucket import s3_bucket
from tests.support.quoting import RECORD

pytestmark = pytest.mark.ray
KEYS = [  # of the JSON, in its order: scripts read it
    "sweep", "study", "mode", "epsilon", "delta", "noise_multiplier", "tokens_total",
    "tokens_charged", "steps_executed", "wasted", "trials", "best", "ledger", "score_source",
    "score_ledger", "unit",
]  # fmt: skip


@pytest.fixture
def sweep(tmp_path, ray_cluster):
    """Runs a sweep of the tiny space; what it says is kept in `sweep.said`."""

    def go(name, space="tests.support.tiny_space", **options):
        options = {
            "storage": str(tmp_path / "sweeps"),
            "key_path": str(tmp_path / "key"),
            **options,
        }
        return run(Options(space, **options), said.append, name)

    said: list[str] = []
    go.said = said  # pyright: ignore[reportFunctionMemberAccess]
    return go


def balanced(result):
    """Each step that was executed was charged, and nothing else."""
    assert list(result.as_json()) == KEYS
    assert result.tokens_charged == result.steps_executed <= result.tokens_total
    assert result.wasted == 0
    assert (
        Ledger.open(result.ledger, create=False).state.study(result.study).used
        == result.tokens_charged
    )
    found = verify(result.ledger)
    assert found.ok, found.problems


@pytest.mark.slow
def test_asha_stops_trials_and_charges_what_they_took(sweep, tmp_path):
    result = sweep("a", trials=6, seed=3)
    balanced(result)
    assert result.trials == 6
    assert result.tokens_charged < 6 * 12  # some were stopped
    assert set(result.best.config) == {"method.rank", "privacy.clip_norm", "method.learning_rate"}
    assert 0 < result.best.naive_epsilon < result.epsilon == 8.0
    assert any("step 12" in line for line in sweep.said)
    assert Storage(tmp_path / "sweeps" / "a").exists(
        f"runs/{result.best.run}/{checkpoint.folder_of(12)}/manifest.json"
    )
    page, table = report(str(tmp_path / "sweeps" / "a"))
    assert page.count("<svg") == 6
    assert "http" not in page.replace("http://www.w3.org", "")  # it needs nothing else
    assert f"{result.best.naive_epsilon:.2f}" in page
    rows = pq.read_table(io.BytesIO(table)).to_pylist()
    assert sum(row["executed"] for row in rows) == result.steps_executed
    assert {row["method.rank"] for row in rows} <= {4, 8}
    shown = CliRunner().invoke(main, ["ledger", "show", result.ledger, "--json"])
    assert (
        sum(r["used"] for r in json.loads(shown.stdout)["studies"]["a"]["runs"].values())
        == result.tokens_charged
    )
    with pytest.raises(ConfigError, match=r"begun with another --trials"):
        resume(str(tmp_path / "sweeps"), "a", {"trials": 7}, print)
    again = resume(str(tmp_path / "sweeps"), "a", {}, print)
    assert (again.tokens_charged, again.best) == (result.tokens_charged, result.best)


def test_the_budget_of_n_steps_gives_n_steps_to_eight_trials(sweep):
    result = sweep("a", trials=8, scheduler="none", tokens=41)
    balanced(result)
    assert result.tokens_charged == result.tokens_total == 41
    assert result.trials == 8


@pytest.mark.slow
def test_trials_of_other_lengths_refreshes_moments_and_methods_pay_alike(sweep, tmp_path):
    result = sweep("a", "tests.support.wide_space", trials=6, scheduler="none", seed=2)
    balanced(result)
    described = [
        json.loads(path.read_text())
        for path in (tmp_path / "sweeps" / "a" / "runs").glob("*/run.json")
    ]
    lengths = [one["privacy"]["steps"] for one in described]
    assert result.tokens_charged == sum(lengths)
    assert len(set(lengths)) > 1
    for field in ("refresh", "moments", "name"):
        assert len({one["method"][field] for one in described}) > 1


@pytest.mark.slow
def test_two_sweeps_at_once_stay_within_one_budget(sweep, tmp_path):
    shared = {
        "ledger": str(tmp_path / "ledger"),
        "ledger_epsilon": 5.0,
        "ledger_delta": 2e-5,
        "trials": 3,
        "epsilon": 2.5,
    }
    results, errors = {}, []

    def go(name):
        try:
            results[name] = sweep(name, **shared)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=go, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for result in results.values():
        balanced(result)
    state = Ledger.open(shared["ledger"], create=False).state
    assert sum(known.study.epsilon for known in state.studies.values()) == state.epsilon == 5.0
    with pytest.raises(BudgetExceeded, match="costs too much"):
        sweep("c", **{**shared, "epsilon": 0.1})
    assert not (tmp_path / "sweeps" / "c").exists()


@pytest.mark.slow
def test_no_trial_goes_on_without_its_ledger(sweep, tmp_path):
    ledger, away, done = tmp_path / "ledger", tmp_path / "away", threading.Event()

    def take_away():
        while not done.wait(0.05):
            if sweep.said[1:] and ledger.exists():  # a trial has reported
                ledger.rename(away)

    thief = threading.Thread(target=take_away)
    thief.start()
    try:
        with pytest.raises(LedgerError):
            sweep(
                "a",
                trials=4,
                scheduler="none",
                ledger=str(ledger),
                assignments=("privacy.steps=400", "performance.eval_every=20"),
            )
    finally:
        done.set()
        thief.join()
    away.rename(ledger)
    executed = sum(
        len(path.read_text().splitlines())
        for path in (tmp_path / "sweeps" / "a" / "runs").glob("*/executed/*")
    )
    assert 0 < executed <= Ledger.open(ledger).state.study("a").used < 4 * 400
    assert verify(ledger).ok


@pytest.mark.slow
def test_population_based_training_goes_on_from_another_trials_checkpoint(sweep, tmp_path):
    result = sweep("a", trials=4, scheduler="pbt", seed=1, assignments=("privacy.steps=40",))
    balanced(result)
    described = [
        json.loads(path.read_text())
        for path in (tmp_path / "sweeps" / "a" / "runs").glob("*/run.json")
    ]
    taken_over = [run for run in described if "origin" in run]
    assert taken_over
    for run_ in taken_over:  # with the rank of the other, and a key of its own
        other = json.loads(Path(run_["origin"][0], "run.json").read_text())
        assert run_["method"]["rank"] == other["method"]["rank"]
        assert run_["run"] != other["run"]


@pytest.mark.slow
def test_optuna_and_median_stopping_pay_alike(sweep):
    pytest.importorskip("optuna")
    balanced(sweep("a", trials=5, scheduler="median", search="optuna", seed=1))


def test_a_selection_releases_its_winner_and_nothing_else(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("TINY_SCORES", "private")
    result = sweep("a", mode="select", scheduler="none", trials=4, epsilon=8.0)
    assert all(
        getattr(result, key) is None
        for key in ("tokens_total", "tokens_charged", "steps_executed", "wasted", "trials")
    )
    assert result.epsilon == 8.0
    assert result.score_source == "private"
    for url in (result.ledger, result.score_ledger):
        state = Ledger.open(url, create=False).state
        assert list(state.selections) == ["a"]
        assert state.studies == {}  # from the charges of trials their number could be told
        assert verify(url).ok
    folder = tmp_path / "sweeps" / "a"
    assert [path.name for path in (folder / "runs").iterdir()] == ["winner"]
    assert not (folder / "tune").exists()
    assert [
        path for path in (tmp_path / "share" / "grape-ray" / "sealed").rglob("*") if path.is_file()
    ] == []
    assert checkpoint.latest(Storage(folder / "runs" / "winner")) is not None
    assert len(sweep.said) == 1  # no report of a trial
    page, table = report(str(folder))
    assert "secret" in page
    assert len(pq.read_table(io.BytesIO(table))) == 1
    exported = CliRunner().invoke(
        main, ["export", str(folder / "runs" / "winner"), str(tmp_path / "model")]
    )
    assert exported.exit_code == 0, exported.output
    again = resume(str(tmp_path / "sweeps"), "a", {}, print)
    assert again == result


def test_a_trial_of_private_scores_pays_for_what_it_says_when_it_is_resumed_by_hand(
    sweep, tmp_path, monkeypatch
):
    monkeypatch.setenv("TINY_SCORES", "private")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    result = sweep("a", trials=1, scheduler="none")
    folder = tmp_path / "sweeps" / "a" / "runs" / result.best.run
    book = Ledger.open(result.score_ledger, create=False)
    before = book.state.study("a").used
    resumed = CliRunner().invoke(
        main, ["resume", str(folder), "--key-file", str(tmp_path / "key"), "--json"]
    )
    assert resumed.exit_code == 0, resumed.output
    assert book.state.study("a").used == before + 1
    accuracy = json.loads(resumed.stdout.splitlines()[-1])["metrics"]["accuracy"]
    # no count of right answers among 50 records
    assert abs(50 * accuracy - round(50 * accuracy)) > 1e-5


def test_a_selection_is_never_drawn_twice(sweep, tmp_path, monkeypatch):
    from grape_ray.ray_backend import private_selection

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(private_selection, "_release", die)
        with pytest.raises(KeyboardInterrupt):
            sweep("a", mode="select", scheduler="none", trials=3)
    sealed = tmp_path / "share" / "grape-ray" / "sealed" / "a"
    drawn = (sealed / "draw.json").read_text()
    assert sealed.stat().st_mode & 0o077 == 0
    assert not (tmp_path / "sweeps" / "a" / "runs").exists()
    (sealed / "draw.json").unlink()
    with pytest.raises(ConfigError, match="refuses to resume without its sealed draw"):
        resume(str(tmp_path / "sweeps"), "a", {}, print)
    (sealed / "draw.json").write_text(drawn)
    result = resume(str(tmp_path / "sweeps"), "a", {}, print)
    assert result.best.config in [values for _, values in json.loads(drawn)]


@pytest.fixture
def bucket():
    """An S3 bucket on the loopback interface, found through the environment by whatever is started
    from here.
    """
    with s3_bucket() as url:
        yield url


def program(*words):
    """The result of `grape-ray tune tests.support.tiny_space` in processes of its own."""
    code = "from grape_ray.cli.main import main; main()"
    words = [*map(str, ("tune", "tests.support.tiny_space", *words)), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return SweepResult.from_json(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_a_sweep_lives_on_an_object_store(bucket, tmp_path):
    where = ("--storage", f"{bucket}/sweeps", "--key-file", tmp_path / "key")
    result = program("--trials", 3, "--name", "a", *where)
    balanced(result)
    assert result.ledger == f"{bucket}/sweeps/a/ledger"
    assert program("--resume", "a", *where).best == result.best
    assert "<svg" in report(f"{bucket}/sweeps/a")[0]


@pytest.mark.slow
def test_trials_on_workers_are_stopped_and_pay_alike(tmp_path):
    where = ("--storage", tmp_path / "sweeps", "--key-file", tmp_path / "key")
    result = program("--trials", 3, "--workers", 1, "--seed", 3, "--name", "a", *where)
    balanced(result)
    assert result.trials == 3


def test_a_sweeps_folder_and_console_quote_no_record(sweep, tmp_path):
    with pytest.raises(TaskFailed, match="the task failed with ValueError"):
        sweep("a", "tests.support.quoting", trials=1, scheduler="none")
    assert list((tmp_path / "sweeps" / "a" / "tune").rglob("error.txt"))
    assert [
        path
        for path in (tmp_path / "sweeps").rglob("*")
        if path.is_file() and RECORD.encode() in path.read_bytes()
    ] == []
    assert RECORD not in "".join(sweep.said)
