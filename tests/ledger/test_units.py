"""A ledger counts one privacy unit."""

import json
from dataclasses import replace

import pytest

from grape_ray.accounting.mechanism import GAUSSIAN, Mechanism
from grape_ray.accounting.selection import Distribution, Selection
from grape_ray.errors import ConfigError, LedgerError
from grape_ray.ledger import Ledger, Study, verify
from grape_ray.ledger.budget import check_share
from grape_ray.ledger.entries import selection_from
from grape_ray.ledger.summary import summary
from grape_ray.storage import Storage

STEP = Mechanism(GAUSSIAN, 0.01, 1.1)
STUDY = Study("s", STEP, 3.0, 1e-6, 100, "user id")
CHOICE = Selection(
    "c", Mechanism(GAUSSIAN, 0.01, 3.0), 3.0, 1e-6, 10,
    Distribution("truncated_negative_binomial", 3.0), "user id",
)  # fmt: skip
OTHER = "another privacy unit, got 'record', expected user id"


@pytest.fixture
def place(tmp_path):
    """Of a ledger by user."""
    Ledger.open(tmp_path, "data", epsilon=8.0, delta=1e-5, unit="user id")
    return tmp_path


def test_studies_and_selections_of_its_unit_are_paid(place):
    ledger = Ledger.open(place, "data", unit="user id")
    assert ledger.ensure_study(STUDY).study == STUDY
    ledger.ensure_selection(CHOICE)
    again = Ledger.open(place)
    assert again.state.unit == "user id"
    assert again.state.study("s").study == STUDY
    assert again.state.selections["c"] == CHOICE == selection_from(CHOICE.payload())
    found = summary(again)
    assert found["unit"] == found["studies"]["s"]["unit"] == "user id"
    assert verify(place).ok


def test_all_others_are_refused(place):
    with pytest.raises(LedgerError, match=OTHER):
        Ledger.open(place, "data", unit="record")
    ledger = Ledger.open(place, "data")
    with pytest.raises(LedgerError, match=OTHER):
        ledger.ensure_study(replace(STUDY, unit="record"))
    with pytest.raises(LedgerError, match=OTHER):
        ledger.ensure_selection(replace(CHOICE, unit="record"))
    ledger.ensure_study(STUDY)
    for unit, match in (("record", OTHER), ("user", "got 'user', expected user id")):
        with pytest.raises(LedgerError, match=match):  # a name that is known opens no way
            check_share(Storage(place), "data", (8.0, 1e-5), replace(STUDY, unit=unit))
    with pytest.raises(LedgerError, match="registered differently"):
        ledger.ensure_study(replace(STUDY, unit="record"))


def test_a_ledger_without_a_unit_is_of_records_and_is_written_as_ever(tmp_path):
    ledger = Ledger.open(tmp_path, "data", epsilon=8.0, delta=1e-5)
    ledger.ensure_study(replace(STUDY, unit="record"))
    for name in ("00000000.json", "00000001.json"):
        assert "unit" not in json.loads((tmp_path / name).read_text())["payload"]
    assert Ledger.open(tmp_path, "data", unit="record").state.unit == "record"
    with pytest.raises(LedgerError, match="got 'user id', expected record"):
        ledger.ensure_study(replace(STUDY, name="t"))


@pytest.mark.parametrize("unit", ["", "a\nb", "x" * 201, 3])
def test_other_names_of_units_are_refused(unit, tmp_path):
    with pytest.raises(ConfigError, match="unit is not a usable name"):
        replace(STUDY, unit=unit)
    with pytest.raises(ConfigError, match="unit is not a usable name"):
        replace(CHOICE, unit=unit)
    with pytest.raises(ConfigError, match="unit is not a usable name"):
        Ledger.open(tmp_path, "data", epsilon=8.0, delta=1e-5, unit=unit)
