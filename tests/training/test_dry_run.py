"""The dry run: what would fail late fails before anything is written or charged, and what only
looks odd trains.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from grape_ray import checkpoint
from grape_ray.cli.main import main
from grape_ray.config.schema import Config
from grape_ray.data.arrays import Ragged, Records
from grape_ray.errors import ConfigError, GrapeRayError, StorageError, TaskFailed
from grape_ray.ray_backend.train import train
from grape_ray.storage import Storage
from grape_ray.training.dry_run import dry_run
from tests.support.plans import planned
from tests.support.tiny import Tiny, tiny
from tests.training.test_late_failures import no_room


@dataclasses.dataclass(frozen=True)
class Nested:
    size: int = 3


@dataclasses.dataclass(frozen=True)
class Odd(Tiny):
    """A task of which one thing at a time is odd."""

    odd: str = ""
    path: object = ""
    sizes: tuple[int, ...] = (1, 2)

    def build_model(self, seed):
        model = super().build_model(seed)
        if self.odd == "complex buffer":
            model.register_buffer("phase", torch.zeros(3, dtype=torch.complex64))
        if self.odd == "slow checkpoint":
            model.register_buffer("frozen", torch.zeros(300_000))
        return model

    def evaluate(self, model, records):
        if self.odd == "raises":
            raise ValueError("only one class in row 3: a secret")
        if self.odd == "needs all classes" and len(set(records.array("labels").tolist())) < 10:
            raise ValueError("only some classes")
        if self.odd == "text":
            return {"accuracy": "high"}
        if self.odd == "nan":
            return {"accuracy": float("nan"), "other": torch.tensor(0.5)}
        return super().evaluate(model, records)

    def save(self, model, folder):
        if self.odd == "no save":
            return
        if self.odd == "save raises":
            raise RuntimeError("shared tensors")
        super().save(model, folder)


@dataclasses.dataclass(frozen=True)
class Texts(Tiny):
    """Sequences of ids for a model with eight positions; one is longer, in training or in
    validation.
    """

    long_in: str = "train"

    def load(self):
        data = super().load()

        def ragged(count, longer):
            lengths = [12 if longer and i == 150 % count else 2 + i % 6 for i in range(count)]
            return Ragged.of([[1] * length for length in lengths])

        def with_ids(records, split):
            return Records({**records.columns, "ids": ragged(len(records), self.long_in == split)})

        return dataclasses.replace(
            data,
            train=with_ids(data.train, "train"),
            validation=with_ids(data.validation, "validation"),
        )

    def build_model(self, seed):
        torch.manual_seed(seed)
        return nn.ModuleDict(
            {"words": nn.Embedding(5, 16), "places": nn.Embedding(8, 16), "head": nn.Linear(16, 10)}
        ).eval()

    def collate(self, records, indices):
        ids, mask = records.sequences("ids").padded(indices, 0)
        return {
            "ids": ids,
            "mask": mask,
            "labels": torch.from_numpy(records.array("labels")[indices]),
        }

    def per_example_loss(self, model, batch):
        logits = self._logits(model, batch)
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    def _logits(self, model, batch):
        places = torch.arange(batch["ids"].shape[1]).expand_as(batch["ids"])
        hidden = model["words"](batch["ids"]) + model["places"](places)
        return model["head"]((hidden * batch["mask"].unsqueeze(2)).sum(1))

    def evaluate(self, model, records):
        batch = self.collate(records, np.arange(len(records)))
        return {
            "accuracy": (self._logits(model, batch).argmax(1) == batch["labels"]).double().mean()
        }


def config(task) -> Config:
    return dataclasses.replace(tiny(), task=task)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run would lie, and what it may not leave there."""

    folder: Path

    def options(self):
        return {
            "storage": str(self.folder / "runs"),
            "ledger": str(self.folder / "ledger"),
            "key_path": str(self.folder / "key"),
        }

    def left(self):
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*"))


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def local_class():
    @dataclasses.dataclass(frozen=True)
    class Local(Tiny):
        pass

    return Local()


@pytest.mark.parametrize(
    ("task", "error", "parts"),
    [
        (Odd(path=Path("/a")), ConfigError, ["task.path cannot be kept in run.json", "PosixPath"]),
        (Odd(path=np.float32(1)), ConfigError, ["task.path", "float32"]),
        (Odd(path=np.float64(1)), ConfigError, ["task.path", "float64"]),
        (Odd(path={1: 2}), ConfigError, ["task.path", "dict"]),
        (Odd(path=Nested()), ConfigError, ["task.path", "Nested"]),
        (Odd(path=(1, 2)), ConfigError, ["task.path", "tuple"]),
        (Odd(path={(1, 2): 3}), ConfigError, ["task.path", "dict"]),
        (Odd(path=b"x"), ConfigError, ["task.path", "bytes"]),
        (local_class(), ConfigError, ["the task of the run cannot be rebuilt", "local_class"]),
        (Odd(odd="raises"), TaskFailed, ["the evaluation of validation records", "only one class"]),
        (
            Odd(odd="raises", public=False),
            TaskFailed,
            ["the evaluation of validation records", "ValueError", "test_dry_run.py"],
        ),
        (Odd(odd="text"), ConfigError, ["metric 'accuracy'", "'str'"]),
        (Odd(odd="no save"), ConfigError, ["task.save wrote nothing"]),
        (Odd(odd="save raises"), TaskFailed, ["the export of the model", "shared tensors"]),
        (
            Texts(long_in="train"),
            TaskFailed,
            [
                "a step on the shortest and the longest training records",
                "IndexError",
                "task.max_tokens",
            ],
        ),
        (
            Texts(long_in="validation"),
            TaskFailed,
            ["the evaluation of validation records", "IndexError"],
        ),
    ],
    ids=lambda value: getattr(value, "odd", None) or getattr(value, "long_in", None) or None,
)
def test_what_would_fail_late_fails_before_anything_is_written(place, task, error, parts):
    with pytest.raises(error) as told:
        planned(config(task), run="a", **place.options())
    assert all(part in str(told.value) for part in parts), str(told.value)
    assert task.public or "secret" not in str(told.value)
    assert place.left() == []


@pytest.mark.parametrize(
    "task",
    [Odd(odd="needs all classes"), Odd(odd="nan"), Odd(odd="complex buffer"), Texts(long_in="")],
    ids=repr,
)
def test_what_only_looks_odd_trains_and_is_resumed(place, task):
    result = train(config(task), run="a", **place.options())
    assert (result.steps, result.problems) == (12, [])
    again = train(config(task), run="a", **place.options())
    assert again.attempts == 2


def test_a_tuple_comes_back_as_a_tuple(place):
    plan = planned(config(Odd(sizes=(3, 4))), run="a", **place.options())
    from grape_ray.config.description import rebuild_config

    assert rebuild_config(json.loads(plan.folder().read("run.json")), (__name__,)) == plan.config


def test_a_full_disk_is_told_at_once_and_nothing_is_charged(place):
    began = time.monotonic()
    with no_room(100_000), pytest.raises(StorageError, match="room for the file"):
        planned(config(Odd(odd="slow checkpoint")), run="a", **place.options())
    assert time.monotonic() - began < 60
    assert place.left() == []


def test_a_disk_without_room_for_the_checkpoints_of_a_run_is_refused(place, monkeypatch):
    import shutil

    usage = shutil.disk_usage(place.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10_000))
    with pytest.raises(StorageError, match="no room for a run"):
        planned(config(Tiny()), run="a", **place.options())
    assert place.left() == []


def test_a_failed_start_can_be_repaired_under_its_name(place):
    with pytest.raises(GrapeRayError):
        planned(config(Odd(odd="raises")), run="a", **place.options())
    assert train(config(Odd()), run="a", **place.options()).steps == 12


def test_the_dry_run_can_be_left_out_but_for_the_preflight(place):
    with pytest.raises(Exception, match="index out of range"):
        planned(config(Texts(long_in="train")), run="a", with_dry_run=False, **place.options())
    assert (
        planned(config(Odd(odd="raises")), run="a", with_dry_run=False, **place.options()).dry_run
        is None
    )


def test_a_dry_run_sees_what_a_run_will_have(tmp_path):
    task = Tiny()
    found = dry_run(tiny(), task.load(), Storage(tmp_path), 1.0, True)
    assert found.metrics == ("accuracy",)
    assert found.checkpoint_bytes > 4 * 2410
    assert found.report.coordinates < found.report.parameters == 2410
    assert list(tmp_path.iterdir()) == []
    assert 1 <= len(found.norms) <= 3
    assert min(found.norms) > 0
    private = dry_run(tiny(), task.load(), Storage(tmp_path), 1.0, False)
    assert private.norms == ()  # they are of records
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        dry_run(tiny(), task.load(), Storage(tmp_path), 1.0, True, "acuracy")


def test_the_program_says_what_it_is_about_to_do(tmp_path):
    words = [
        "train",
        "tests.support.tiny:tiny",
        "--run",
        "a",
        "--storage",
        str(tmp_path / "runs"),
        "--key-file",
        str(tmp_path / "key"),
        "--json",
    ]
    result = CliRunner(env={"XDG_DATA_HOME": str(tmp_path)}).invoke(main, words)
    assert result.exit_code == 0, result.output
    for part in ("200 records, the unit is one record", "sampling_prob 0.25",
    "delta 1e-05 (0.002 over the records)", "signal to noise",
                 "epsilon 8, 8 free before this run and 0 after it",
                 "dry run passed in"):  # fmt: skip
        assert part in result.stderr
    facts = json.loads(result.stdout.splitlines()[-1])["plan"]
    assert facts["budget"] == {"epsilon": 8.0, "left_before": 8.0, "left_after": 0.0}
    assert facts["resumes"] is None
    noise, numbers = facts["noise_multiplier"], facts["coordinates"]
    assert facts["signal_to_noise"] == pytest.approx(50 / noise / numbers**0.5)
    # error of a projection over noise: refresh * signal_to_noise^2 at most, to be a tenth
    allowed = max(1, int(0.1 * numbers * (noise / 50) ** 2))
    assert (facts["refresh"], facts["longest_refresh"]) == (5, allowed)
    assert ("projections are kept for 5 steps" in result.stderr) == (allowed < 5)
    assert facts["signal_to_noise"] < 3
    assert facts["better_rank"] is None
    assert "projections of rank" not in result.stderr
    for epsilon, in_full in ((20, False), (99, True)):
        few = [*words, "--set", "method.rank=2", "--set", f"privacy.epsilon={epsilon}"]
        few[few.index("a")] = f"at-{epsilon}"
        result = CliRunner(env={"XDG_DATA_HOME": str(tmp_path)}).invoke(main, few)
        facts = json.loads(result.stdout.splitlines()[-1])["plan"]
        more = (facts["signal_to_noise"] / 2) ** 2
        assert (facts["coordinates"] * more > 2410) == in_full  # of the model's parameters
        assert facts["better_rank"] == (0 if in_full else math.ceil(2 * more))
        told = "bookkeeping" if in_full else f"rank {facts['better_rank']}, or bookkeeping"
        assert f"projections of rank 2 lose more than the noise hides: {told}" in result.stderr
    again = CliRunner(env={"XDG_DATA_HOME": str(tmp_path)}).invoke(main, [*words, "--no-dry-run"])
    assert (
        "resumes at step 12: 0 steps that were paid for are taken and paid for again; 12 steps"
        " are charged so far and 12 more" in again.stderr
    )
    assert json.loads(again.stdout.splitlines()[-1])["plan"]["dry_run_seconds"] is None


@pytest.mark.parametrize("method", ["grape", "dp_adam", "dp_galore", "ghost", "dp_zero", "none"])
def test_what_a_dry_run_writes_has_seen_no_record_and_no_noise(tmp_path, monkeypatch, method):
    """A dry run that is killed may leave its checkpoint behind."""
    kept = []
    # killed before it has tidied up
    monkeypatch.setattr(Storage, "remove", lambda self, name: None)
    started = tiny().task.build_model(0).state_dict()
    monkeypatch.setattr(
        "grape_ray.privacy.noise.NoiseStream.claim", lambda self, step: kept.append(step)
    )
    config = dataclasses.replace(tiny(), method=dataclasses.replace(tiny().method, name=method))
    dry_run(config, config.task.load(), Storage(tmp_path), 1.0, True)
    assert kept == []
    (folder,) = (p for p in tmp_path.iterdir() if p.name.startswith("scratch-"))
    found = checkpoint.latest(Storage(folder))
    assert found is not None
    assert all(torch.equal(tensor, started[name]) for name, tensor in found.model.items())
    assert all(
        not tensor.any()
        for name, tensor in found.optimizer.items()
        if name.startswith(("first/", "second/"))
    )
