"""What fails while a run is on its way, and need not end it: evaluations, trackers, a disk that is
full for a time.
"""

import contextlib
import dataclasses
import json
import resource
import signal
import threading
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from grape_ray import checkpoint
from grape_ray.cli.main import main
from grape_ray.distributed.comms import Comms
from grape_ray.errors import ConfigError, StorageError
from grape_ray.ledger.audit import verify
from grape_ray.ray_backend.train import train
from grape_ray.storage import Storage
from grape_ray.tasks.metrics import plain
from grape_ray.training.callbacks import RunCallbacks
from grape_ray.training.evaluate import evaluate
from grape_ray.training.export import export
from grape_ray.training.result import read_result
from grape_ray.training.run import execute
from tests.support.plans import planned
from tests.support.tiny import Tiny, tiny


@dataclasses.dataclass(frozen=True)
class Moody(Tiny):
    """A task whose evaluations fail: by chance, after the first so many."""

    fails: float = 1.0
    seed: int = 0
    good: int = 1

    def evaluate(self, model, records):
        MOODS.append(1)
        if (
            len(MOODS) > self.good
            and np.random.default_rng([self.seed, len(MOODS)]).random() < self.fails
        ):
            raise KeyError("row 17: a secret")
        return {"accuracy": np.float32(0.5), "loss": torch.tensor([1.5]), "n": len(records)}


MOODS: list[int] = []


@pytest.fixture(autouse=True)
def _fresh():
    MOODS.clear()


def moody(**task):
    config = tiny()
    return dataclasses.replace(
        config,
        task=Moody(**task),
        performance=dataclasses.replace(config.performance, eval_every=3),
    )


def whole(result, folder, tmp_path):
    """All steps are trained, checkpointed, charged once and exportable."""
    assert (result.steps, result.charged_steps, result.executed_steps) == (12, 12, 12)
    assert verify(result.ledger).ok
    assert checkpoint.latest(Storage(folder)).step == 12
    assert (
        export(
            str(folder),
            tmp_path / "out",
            trust=("tests.training.test_late_failures", "tests.support.tiny"),
        )
        == 12
    )


def test_an_evaluation_that_raises_is_told_and_costs_nothing(tmp_path):
    options = {"storage": str(tmp_path / "runs"), "key_path": str(tmp_path / "key")}
    result = train(moody(public=False), run="a", ledger=str(tmp_path / "ledger"), **options)
    whole(result, tmp_path / "runs" / "a", tmp_path)
    (problem,) = result.problems
    assert problem.startswith("an evaluation failed: KeyError at training/test_late_failures.py:")
    assert "secret" not in problem
    assert result.metrics == {}
    assert read_result(Storage(tmp_path / "runs" / "a")) == result
    MOODS.clear()
    shown = train(moody(good=3, public=True, records=190), run="b", **options)
    assert shown.problems == ["an evaluation failed: KeyError: 'row 17: a secret'"]
    assert shown.metrics == {"accuracy": 0.5, "loss": 1.5, "n": 50.0}  # of the second evaluation
    assert shown.metrics_step < 12  # pyright: ignore[reportOptionalOperand]


@contextlib.contextmanager
def no_room(size=0):
    """No file may grow beyond `size`, as on a full disk: what the kernel says is EFBIG."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def make_room():
    resource.setrlimit(
        resource.RLIMIT_FSIZE,
        (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]),
    )


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 20))]
)
def test_chaos_of_evaluations_trackers_and_a_full_disk_leaves_a_whole_run(tmp_path, seed):
    chance = np.random.default_rng(seed)
    full_at, dead_from = int(chance.integers(1, 12)), int(chance.integers(1, 12))

    def tracker(progress, epsilon):
        if progress.step >= dead_from:
            raise ConnectionError("the tracker is gone")

    def fill(step):
        if step == full_at:
            full.enter_context(no_room())
            emptied.start()

    full = contextlib.ExitStack()
    emptied = threading.Timer(0.2, make_room)
    config = moody(fails=0.5, seed=seed, good=1)
    plan = planned(config, run="a", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    with full:
        result = execute(plan, Comms.local(), RunCallbacks(on_progress=tracker, on_step=fill))
        emptied.join()
    whole(result, tmp_path / "runs" / "a", tmp_path)
    assert any("progress could not be shown: ConnectionError" in p for p in result.problems)


def test_a_disk_that_stays_full_is_told_after_the_deadline_and_the_first_look_at_once(tmp_path):
    place = Storage(tmp_path / "s", deadline_s=0.6)
    with no_room():
        for storage in (place, Storage(tmp_path / "s").first_contact()):
            with pytest.raises(StorageError, match="room for the file"):
                storage.write("a", b"1")
        emptied = threading.Timer(0.2, make_room)
        emptied.start()
        place.write("b", b"22")
        emptied.join()
    assert place.list() == ["b"]


def test_metrics_of_any_librarys_scalars_are_floats():
    values = [
        1,
        True,
        0.5,
        np.float16(0.5),
        np.int64(3),
        np.array([2.0]),
        torch.tensor(0.25),
        torch.tensor([7]),
        Decimal("0.5"),
        Fraction(1, 4),
    ]
    found = plain({str(i): v for i, v in enumerate(values)} | {"nan": float("nan")})
    assert list(found.values())[:-1] == [1, 1, 0.5, 0.5, 3, 2, 0.25, 7, 0.5, 0.25]
    assert {type(v) for v in found.values()} == {float}
    assert found["nan"] != found["nan"]


@pytest.mark.parametrize(
    ("found", "part"),
    [
        (None, "gave no metrics, got 'NoneType'"),
        (0.5, "a mapping"),
        ({"f1": [0.1, 0.2]}, "metric 'f1', got 'list'"),
        ({"f1": torch.zeros(2)}, "metric 'f1', got 'Tensor'"),
        ({"text": "a secret"}, "metric 'text', got 'str'"),
        ({"c": 1j}, "got 'complex'"),
        ({3: 0.5}, "a metric's name"),
    ],
)
def test_what_is_no_metric_is_told_by_name_without_its_value(found, part):
    with pytest.raises(ConfigError) as told:
        plain(found)
    assert part in str(told.value)
    assert "secret" not in str(told.value)
    assert told.value.__cause__ is None


def test_a_failed_evaluation_is_made_up_for_later_free_of_privacy_cost(tmp_path):
    folder = tmp_path / "runs" / "a"
    result = train(moody(), run="a", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    assert (result.metrics, len(result.problems)) == ({}, 1)
    head = verify(result.ledger).head
    call = CliRunner().invoke(
        main, ["evaluate", str(folder), "--trust-module", "tests.training.test_late_failures"]
    )
    assert call.exit_code != 0
    MOODS.clear()
    words = [
        "evaluate",
        str(folder),
        "--trust-module",
        "tests.training.test_late_failures",
        "--json",
    ]
    found = json.loads(CliRunner().invoke(main, words).stdout.splitlines()[-1])
    assert found == {"run": "a", "step": 12, "metrics": {"accuracy": 0.5, "loss": 1.5, "n": 50.0}}
    kept = json.loads((folder / "result.json").read_text())
    assert (kept["metrics"], kept["metrics_step"]) == (found["metrics"], 12)
    assert verify(result.ledger).head == head
    description = json.loads((folder / "run.json").read_text())
    description["validation"] = {
        "metric": "accuracy",
        "noise_multiplier": 1.0,
        "ledger": str(tmp_path),
        "study": "s",
    }
    (folder / "run.json").write_text(json.dumps(description))
    with pytest.raises(ConfigError, match="validation records are private"):
        evaluate(str(folder), trust=("tests.training.test_late_failures",))
