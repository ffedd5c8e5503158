"""An audit finds every kind of tampering, and names the entry."""

import json
import math

import pytest

from grape_ray.accounting import Mechanism
from grape_ray.errors import LedgerError
from grape_ray.ledger import Ledger, Study, verify
from grape_ray.ledger.entries import Entry, decode

STUDY = Study("s", Mechanism("poisson_gaussian", 1.0, 10.0), 4.0, 1e-6, 20)


@pytest.fixture
def folder(tmp_path):
    """A ledger of seven entries: open, study, attempt, charge, charge, refund, attempt."""
    ledger = Ledger.open(str(tmp_path / "l"), "data", 8.0, 1e-5)
    ledger.ensure_study(STUDY)
    attempt = ledger.begin_attempt("s", "r", "id")
    ledger.charge("s", "r", attempt, 0, 5)
    ledger.charge("s", "r", attempt, 1, 5)
    ledger.refund("s", "r", attempt, 1, 2)
    ledger.begin_attempt("s", "r", "id")
    assert verify(tmp_path / "l", ledger.head).ok
    return tmp_path / "l"


def path(folder, seq):
    return folder / f"{seq:08d}.json"


def forge(folder, changes):
    """Rewrite the ledger with changed payloads (or added entries), and every link and hash in
    order, as a clever forger would.
    """
    entries = [decode(p.name, p.read_bytes()) for p in sorted(folder.glob("*.json"))]
    facts = [(e.kind, dict(e.payload)) for e in entries]
    for seq, (kind, payload) in changes.items():
        facts[seq : seq + 1] = [
            (
                kind,
                {
                    **(facts[seq][1] if seq < len(facts) and facts[seq][0] == kind else {}),
                    **payload,
                },
            )
        ]
    prev = "0" * 64
    for seq, (kind, payload) in enumerate(facts):
        entry = Entry(seq, prev, kind, payload, 1.0, "0")
        path(folder, seq).write_bytes(entry.encode())
        prev = entry.hash


def complaints(folder):
    report = verify(folder)
    assert not report.ok
    with pytest.raises(LedgerError):
        Ledger.open(folder)
    return "\n".join(report.problems)


@pytest.mark.parametrize("seq", range(6))
def test_a_missing_entry_is_named(folder, seq):
    path(folder, seq).unlink()
    assert f"{seq:08d}.json: missing" in complaints(folder)


def test_swapped_entries_are_named(folder):
    a, b = path(folder, 3).read_bytes(), path(folder, 4).read_bytes()
    path(folder, 3).write_bytes(b)
    path(folder, 4).write_bytes(a)
    found = complaints(folder)
    assert "00000003.json" in found
    assert "00000004.json" in found


@pytest.mark.parametrize("seq", range(7))
def test_an_edited_entry_is_named(folder, seq):
    fields = json.loads(path(folder, seq).read_bytes())
    fields["time"] += 1.0
    path(folder, seq).write_text(json.dumps(fields))
    assert f"{seq:08d}.json" in complaints(folder)


def test_an_edited_entry_with_a_fitting_hash_breaks_the_link(folder):
    entry = decode("x", path(folder, 3).read_bytes())
    path(folder, 3).write_bytes(
        Entry(
            3, entry.prev, "charge", {**entry.payload, "steps": 1}, entry.time, entry.nonce
        ).encode()
    )
    assert "00000004.json: the chain is broken" in complaints(folder)


def test_a_ledger_cut_off_at_the_end_shows_against_a_noted_head(folder):
    head = Ledger.open(folder).head
    path(folder, 6).unlink()
    assert verify(folder).ok
    assert "cut off" in verify(folder, head).problems[0]


CHARGE = {
    "study": "s",
    "run": "r",
    "attempt": 2,
    "chunk": 0,
    "first_step": 0,
    "asked": 30,
    "steps": 30,
}
EXTEND = {"epsilon": 9.0, "delta": 1e-5, "reason": "the board"}
ATTEMPT = {"study": "s", "run": "r", "attempt": 2, "key_id": "id"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({7: ("charge", CHARGE)}, "00000007.json: study 's' is overdrawn"),
        ({7: ("charge", {**CHARGE, "steps": 2, "asked": 1})}, "more steps granted"),
        ({7: ("charge", {**CHARGE, "steps": 1, "attempt": 1, "chunk": 2})}, "attempt 2 has begun"),
        ({7: ("charge", {**CHARGE, "steps": 0})}, "steps is not a usable count"),
        ({4: ("charge", {"first_step": 4})}, "asked for twice under one key"),
        ({4: ("charge", {"chunk": 0})}, "does not grow"),
        ({5: ("refund", {"steps": 6})}, "refund above its charge"),
        ({5: ("refund", {"chunk": 0})}, "cannot be refunded"),
        ({7: ("attempt", ATTEMPT)}, "wrong number"),
        ({7: ("attempt", {**ATTEMPT, "attempt": 4})}, "wrong number"),
        ({7: ("study", STUDY.payload())}, "registered twice"),
        (
            {7: ("study", {**STUDY.payload(), "name": "t", "epsilon": 5.0}), 8: ("extend", EXTEND)},
            "00000007.json: study 't' costs too much",
        ),
        ({7: ("extend", {**EXTEND, "epsilon": 7.0})}, "can only be raised"),
        ({7: ("extend", {**EXTEND, "reason": ""})}, "stated reason"),
        ({7: ("study", {**STUDY.payload(), "name": "t", "epsilon": 5.0})}, "costs too much"),
        ({0: ("open", {"epsilon": 3.0})}, "costs too much"),
        ({0: ("open", {"format": 2})}, "another format"),
        (
            {
                7: (
                    "open",
                    {
                        "format": 1,
                        "ledger_id": "x",
                        "dataset_id": "d",
                        "epsilon": 1.0,
                        "delta": 1e-5,
                    },
                )
            },
            "only opening",
        ),
    ],
)
def test_a_broken_rule_is_found_though_all_hashes_fit(folder, changes, complaint):
    forge(folder, changes)
    assert complaint in complaints(folder)


def test_a_study_with_more_steps_than_its_epsilon_buys_is_found(folder):
    forge(folder, {1: ("study", {"tokens": 5000})})
    assert "does not buy the 5000 steps" in "\n".join(verify(folder).problems)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"seq": 3}', b"x" * 70_000]
)
def test_malformed_entries_are_named(folder, text):
    path(folder, 3).write_bytes(text)
    assert "00000003.json" in complaints(folder)


NO_COUNTS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "-1",
    "1e400",
    "1" + "0" * 400,
    "1" * 5000,
    "1.5",
    "true",
    '"3"',
    "null",
]


@pytest.mark.parametrize("number", NO_COUNTS)
def test_numbers_that_are_none_are_refused(folder, number):
    text = path(folder, 3).read_text().replace('"steps":5', f'"steps":{number}')
    path(folder, 3).write_text(text)
    found = complaints(folder)
    assert "00000003.json" in found
    assert len(found) < 5000


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_entry_with_such_a_number_is_ever_written(value):
    with pytest.raises(ValueError, match="JSON"):
        Entry(0, "0", "open", {"epsilon": value}, 0.0, "0").encode()


def test_an_empty_folder_is_no_ledger(tmp_path):
    with pytest.raises(LedgerError, match="no ledger"):
        verify(tmp_path)
