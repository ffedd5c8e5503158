"""One dataset has one budget: however its ledger's place is written, and whichever of its columns
are read.
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from grape_ray.cli.main import main
from grape_ray.data import content
from grape_ray.data.arrays import Records
from grape_ray.data.fingerprints import column_fingerprints, fingerprint_arrays, fingerprint_records
from grape_ray.errors import BudgetExceeded, DataError, GrapeRayError, LedgerError
from grape_ray.ledger import registry
from grape_ray.ledger.location import canonical, home
from grape_ray.tasks.task import Data
from tests.support.plans import planned
from tests.support.tiny import Tiny, tiny


@pytest.fixture
def plan(tmp_path):
    """A plan on private records."""
    config = tiny(public=False)
    return lambda config=config, run="r", **options: planned(
        config, run=run, key_path=str(tmp_path / "key"), **options
    )


@pytest.fixture
def ways(tmp_path):
    """One folder's names."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    return [f"{tmp_path}/real", f"{tmp_path}/real/", f"file://{tmp_path}/real",
    f"local://{tmp_path}/real", f"{tmp_path}/link",
            f"{tmp_path}/x/../real"]  # fmt: skip


def test_all_ways_of_writing_a_folder_are_one_place(ways):
    assert len({canonical(way) for way in ways}) == 1
    assert canonical("s3://bucket/a/") == canonical("s3://bucket/a") != canonical("s3://bucket/b")


def test_local_storage_has_one_ledger_however_it_is_written(plan, tmp_path, ways):
    first = plan(storage=str(tmp_path / "elsewhere"))
    assert Path(first.ledger).parent == home() / "ledgers"
    for place in ways:
        with pytest.raises(BudgetExceeded, match="costs too much"):
            plan(run="again", storage=place)


@pytest.mark.parametrize("second", ["memory://one-budget/runs", None])
def test_a_second_ledger_is_opened_on_request_alone(plan, tmp_path, second):
    plan(storage=str(tmp_path / "runs"))
    options = (
        {"storage": second}
        if second
        else {"storage": str(tmp_path / "runs"), "ledger": str(tmp_path / "other")}
    )
    with pytest.raises(LedgerError, match=r"paid for by another ledger already.*--second-ledger"):
        plan(run="again", **options)
    assert plan(run="again", second_ledger=True, **options).ledger
    with pytest.raises(BudgetExceeded):
        plan(run="third", **options)  # both are known by now


def test_a_public_label_opens_no_second_budget(plan, tmp_path):
    plan(storage=str(tmp_path / "runs"))
    with pytest.raises(LedgerError, match="paid for by another ledger"):
        plan(tiny(), run="again", storage=str(tmp_path / "runs"))


def test_a_ledger_that_was_moved_is_the_same_and_a_copy_or_a_new_one_is_not(plan, tmp_path):
    options = {"storage": str(tmp_path / "runs"), "ledger": str(tmp_path / "ledger")}
    plan(**options)
    shutil.copytree(tmp_path / "ledger", tmp_path / "copy")
    with pytest.raises(LedgerError, match="another ledger"):
        plan(run="again", storage=str(tmp_path / "runs"), ledger=str(tmp_path / "copy"))
    shutil.rmtree(tmp_path / "ledger")
    with pytest.raises(LedgerError, match="removed or replaced"):
        plan(run="again", **options)
    with pytest.raises(BudgetExceeded):  # the copy took the ledger's place
        plan(run="again", storage=str(tmp_path / "runs"), ledger=str(tmp_path / "copy"))


def test_the_registry_is_the_users_own_and_holds_no_fingerprint(plan, tmp_path):
    made = plan(storage=str(tmp_path / "runs"))
    files = [path for path in (home() / "datasets").iterdir()]
    assert len(files) == 2
    for path in files:
        assert path.stat().st_mode & 0o077 == 0
        assert not any(name.encode() in path.read_bytes() for name in Tiny().load().identity)
    assert (home() / "datasets").stat().st_mode & 0o077 == 0
    assert [entry.place for entry in registry.known([made.dataset_id])] == [
        os.path.realpath(made.ledger)
    ]
    (home() / "datasets" / "salt").rename(tmp_path / "salt")
    with pytest.raises(GrapeRayError, match="registry of ledgers is damaged"):
        plan(run="again", storage=str(tmp_path / "runs"))
    (tmp_path / "salt").rename(home() / "datasets" / "salt")
    files[0 if files[0].suffix else 1].write_text("{")
    with pytest.raises(GrapeRayError, match="registry of ledgers is damaged"):
        plan(run="again", storage=str(tmp_path / "runs"))


@dataclass(frozen=True)
class Columns(Tiny):
    """Images, labels, or both, and a constant."""

    wanted: str = "x,labels"
    public: bool = False

    def load(self) -> Data:
        data = super().load()
        constant = np.ones(self.records, dtype=np.int64)
        columns = {
            **{name: data.train.array(name) for name in self.wanted.split(",")},
            "constant": constant,
        }
        return Data(
            Records(columns), data.validation, fingerprint_arrays(*columns.values()), self.public
        )


@pytest.mark.parametrize(
    ("first", "then"), [("x,labels", "x"), ("x", "x,labels"), ("x,labels", "labels")]
)
def test_other_columns_of_one_table_are_no_other_dataset(tmp_path, first, then):
    one, two = Columns(wanted=first).load(), Columns(wanted=then).load()
    assert one.dataset_id != two.dataset_id
    registry.register(one.identity, str(tmp_path / "ledger"), "id")
    with pytest.raises(LedgerError, match="these records, or columns of them"):
        registry.check_only(str(tmp_path / "other"), two.identity, second=False)


def test_columns_that_say_little_are_in_many_datasets(tmp_path):
    registry.register(Columns(wanted="x").load().identity, str(tmp_path / "ledger"), "id")
    # the constant is in both
    registry.check_only(
        str(tmp_path / "other"), Columns(wanted="labels").load().identity, second=False
    )


def test_a_tables_columns_are_known_by_their_content():
    rows = 100
    table = pa.table(
        {
            "text": [f"text {n}" for n in range(rows)],
            "label": [n % 2 for n in range(rows)],
            "one": [1] * rows,
        }
    )
    found = content.fingerprint_columns(table)
    assert len(set(found)) == 2
    assert set(content.fingerprint_columns(table.select(["text"]))) < set(found)
    assert set(content.fingerprint_columns(table.rename_columns(["a", "b", "c"]))) == set(found)
    assert set(content.fingerprint_columns(table.slice(0, 99))).isdisjoint(found)


def test_small_tables_are_known_by_their_values_and_row_numbers_tell_nothing():
    texts = [f"a short text about {word}" for word in ("wine", "rain", "stone", "glass", "salt")]
    table = pa.table({"text": texts, "label": [0, 1, 1, 0, 1], "row": range(5)})
    assert content.fingerprint_columns(table) == content.fingerprint_columns(table.select(["text"]))
    rows = np.arange(1000)
    columns = {
        "row": rows,
        "constant": np.zeros(1000),
        "x": np.random.default_rng(0).normal(size=(1000, 2)),
    }
    assert len(column_fingerprints(Records(columns))) == 1


def test_the_programs_have_the_flag():
    for name in ("train", "tune"):
        assert "--second-ledger" in CliRunner().invoke(main, [name, "--help"]).output


@dataclass(frozen=True)
class Held(Tiny):
    """Validation records that are, or partly are, training records."""

    taken: int = 50
    public: bool = False

    def load(self) -> Data:
        data = super().load()
        columns = {
            name: (
                np.concatenate(
                    [
                        data.train.array(name)[: self.taken],
                        data.validation.array(name)[: 50 - self.taken],
                    ]
                )[::-1].copy()
            )
            for name in data.train.columns
        }
        return replace(data, validation=Records(columns))


def test_training_records_are_no_validation_records(tmp_path, plan):
    with pytest.raises(DataError, match="are the training records, got '50 of 50 rows'"):
        plan(replace(tiny(), task=Held()), storage=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
    with pytest.warns(UserWarning, match="^7 of 50 validation records are training records"):
        plan(replace(tiny(), task=Held(taken=7)), storage=str(tmp_path / "runs"))


def test_records_that_are_known_as_private_are_not_spoken_of_exactly(tmp_path, plan):
    held = Tiny(public=False).load().validation
    registry.register(
        (fingerprint_records(held), *column_fingerprints(held)), str(tmp_path / "ledger"), "id"
    )
    baseline = tiny().override(["method.name=none"])
    # whether or not the training records are public
    for config in (tiny(public=False), tiny(), baseline):
        with pytest.raises(DataError, match="known as private"):
            plan(config, storage=str(tmp_path / "runs"))
