"""Copies of ledgers, permissions, hostile manifests, and what a private selection must not tell
before its end.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from grape_ray import checkpoint
from grape_ray.accounting import Mechanism
from grape_ray.accounting.mechanism import MAX_EPSILON
from grape_ray.checkpoint.manifest import read_manifest
from grape_ray.distributed.comms import Comms
from grape_ray.errors import CheckpointError, LedgerError
from grape_ray.ledger import Ledger, Study
from grape_ray.privacy import keys
from grape_ray.privacy.random_streams import normals
from grape_ray.storage import Storage
from grape_ray.training.attempt import begin_attempt
from grape_ray.training.private_scores import PrivateScore, Terms
from grape_ray.training.run import execute
from grape_ray.tuning import prepare as sweeps_prepare
from grape_ray.tuning import price, spaces
from grape_ray.tuning.options import Options
from tests.support.plans import planned
from tests.support.tiny import tiny

TERMS = Terms("accuracy", 30.0, "", "s")


def test_two_copies_of_a_ledger_lead_to_two_noises(tmp_path):
    paths = [tmp_path / "ledger", tmp_path / "copy"]
    Ledger.open(paths[0], tiny().task.load().dataset_id, 8.0, 1e-5)
    shutil.copytree(*paths)
    options = {"run": "same", "key_path": str(tmp_path / "key")}
    plans = [
        planned(tiny(), storage=str(tmp_path / p.name / "runs"), ledger=str(p), **options)
        for p in paths
    ]
    attempts = [begin_attempt(plan, Comms.local()) for plan in plans]
    assert attempts[0].number == attempts[1].number == 1
    assert Ledger.open(paths[0]).ledger_id == Ledger.open(paths[1]).ledger_id
    for stream in ("noise_key", "sampling_key", "dropout_key", "probe_key"):
        one, two = (getattr(attempt, stream) for attempt in attempts)
        assert (normals(one, 0, 0, 8) != normals(two, 0, 0, 8)).all()


def test_two_copies_of_a_score_ledger_lead_to_two_noises(tmp_path):
    study = Study("s", Mechanism("poisson_gaussian", 1.0, 30.0), 9.0, 1e-5, 40)
    Ledger.open(tmp_path / "ledger", "validation", 9.0, 1e-4).ensure_study(study)
    shutil.copytree(tmp_path / "ledger", tmp_path / "copy")
    books = [Ledger.open(tmp_path / name) for name in ("ledger", "copy")]
    given = [
        PrivateScore(lambda b=b: b, TERMS, "r", str(tmp_path / "key"), "validation") for b in books
    ]
    assert given[0]({"accuracy": 0.5}, 100) != given[1]({"accuracy": 0.5}, 100)


def test_an_attempts_key_is_fresh_and_every_rank_has_it(tmp_path):
    master = bytes(range(32))
    assert keys.of_attempt(master, "l", "s", "r", 1) != keys.of_attempt(master, "l", "s", "r", 1)

    class Second(Comms):
        sent: tuple  # by rank 0: what it has done, and what it has failed with

        def broadcast_object(self, value):
            return self.sent

    plan = planned(tiny(), run="a", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    told = begin_attempt(plan, Comms.local())
    second = Second(1, 2)
    second.sent = told, None
    assert begin_attempt(plan, second) is told
    second.sent = None, LedgerError("the ledger cannot be reached")
    with pytest.raises(LedgerError, match="reached"):
        begin_attempt(plan, second)


def test_ledgers_are_their_owners_alone(tmp_path):
    plan = planned(
        tiny(public=False), run="a", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key")
    )
    execute(plan, Comms.local())
    ledger = Storage(plan.ledger)
    files = list(Path(ledger.url).rglob("*"))
    assert len(files) > 3
    assert all(path.stat().st_mode & 0o077 == 0 for path in [*files, files[0].parent])


@pytest.fixture
def manifests(tmp_path):
    """Writes the manifest of a checkpoint of some step; the run's folder."""
    folder = tmp_path / "run"

    def write(step, **over):
        place = folder / f"checkpoints/step-{step:08d}-attempt-0001"
        place.mkdir(parents=True)
        fields = {
            "step": step,
            "pieces": {},
            "files": {},
            "counters": {"optimizer": {}},
            "facts": {},
            "base": None,
            "format": 2,
            **over,
        }
        (place / "manifest.json").write_text(json.dumps(fields))

    return write, Storage(folder)


def name(step):
    return f"checkpoints/step-{step:08d}-attempt-0001"


@pytest.mark.parametrize(
    "over",
    [
        {"base": name(2)}, {"base": name(1)}, {"base": "../../x"}, {"base": "checkpoints"},
        {"base": "/etc"}, {"base": 5}, {"base": name(7)}, {"files": {"../../../secret": 5}},
        {"files": {"/etc/passwd": 5}}, {"files": {"..": 5}},
        {"pieces": {"model": [{"name": "w", "file": "../x", "offset": 0, "bytes": 4, "sha256": "",
        "dtype": "F32", "global_shape": [1],
                               "start": 0, "rows": 1}]}},
    ],
)  # fmt: skip
def test_a_manifest_leads_nowhere_but_to_a_full_checkpoint_of_the_run(manifests, over):
    write, folder = manifests
    write(0)
    write(1, base=name(2) if over == {"base": name(1)} else name(0))  # half of a circle, or a delta
    write(2, **over)
    with pytest.raises(CheckpointError):
        checkpoint.load(folder, name(2))
    with pytest.warns(UserWarning, match="passed over"):
        found = checkpoint.latest(folder)
    assert found is not None
    assert found.name in (name(0), name(1))
    assert read_manifest(folder, name(0)).base is None


@pytest.mark.parametrize("trials", [0, 1, 40])
def test_how_many_trials_there_are_decides_no_error(tmp_path, trials):
    from grape_ray.ray_backend.private_selection import Sealed, _open_sealed

    options = Options(
        "tests.support.tiny_space",
        mode="select",
        scheduler="none",
        storage=str(tmp_path / "s"),
        key_path=str(tmp_path / "key"),
    )
    begun = sweeps_prepare.prepare(options, *spaces.load("tests.support.tiny_space"), "a")
    paid = replace(
        begun.steps.paid, mechanism=Mechanism("poisson_gaussian", 1.0, 0.05), trial_tokens=12
    )
    assert price.trial_epsilon(paid) * 40 > MAX_EPSILON > price.trial_epsilon(paid)
    costly = replace(begun, steps=replace(begun.steps, paid=paid))
    _open_sealed(
        costly, Storage(tmp_path / "sealed"), [Sealed(f"{n:016x}", {}) for n in range(trials)]
    )
    ledgers = list((tmp_path / "sealed").rglob("00000001.json"))
    assert len(ledgers) == trials  # each for itself
