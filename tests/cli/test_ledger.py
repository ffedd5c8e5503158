"""A dataset's budget is handled on purpose: made, listed, shown and raised through the command
line, and never left by a slip.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from grape_ray.cli.main import main
from grape_ray.ledger.audit import verify
from grape_ray.tasks.task import label


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls the program on a tiny private task; returns click's result."""
    monkeypatch.chdir(tmp_path)

    def go(*words):
        if words[0] == "train":
            places = ["--storage", "runs", "--key-file", tmp_path / "key", "--json"]
            words = [
                "train",
                "tests.support.tiny:tiny",
                "--set",
                "task.public=false",
                *places,
                *words[1:],
            ]
        return CliRunner().invoke(main, [str(word) for word in words])

    return go


def answer(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def refused(result, *parts):
    """One line of what is wrong on stderr, status 2."""
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def epsilon(value):
    return ["--set", f"privacy.epsilon={value}"]


@pytest.mark.parametrize("delta", [[], ["--ledger-delta", "2e-5"]])
def test_a_pilot_leaves_room_for_the_final_run(call, delta):
    pilot = answer(call("train", "--run", "pilot", *epsilon(1), "--ledger-epsilon", 3, *delta))
    final = answer(call("train", "--run", "final", *epsilon(2)))
    assert pilot["ledger"] == final["ledger"]
    refused(
        call("train", "--run", "more", *epsilon(0.1)), "costs too much", "leave of the dataset's 3"
    )
    (row,) = answer(call("ledger", "list", "--json"))["ledgers"]
    assert (row["dataset"], row["ledger"], row["epsilon"], row["epsilon_left"]) == (
        "tiny",
        pilot["ledger"],
        3.0,
        0.0,
    )
    assert row["delta"] == (2e-5 if delta else 3e-5)
    assert (row["runs"], row["studies"], row["problem"]) == (["pilot", "final"], 2, None)
    assert 0 < row["epsilon_spent"] < 3
    listed = call("ledger", "list").stdout
    assert f"tiny: {pilot['ledger']}" in listed
    assert "epsilon 3, 3 taken by 2 studies" in listed


@pytest.mark.parametrize(
    ("words", "lack"),
    [
        (["--ledger-epsilon", 3, "--ledger-delta", 1e-5], "delta"),
        (["--ledger-delta", 2e-5], "epsilon"),
    ],
)
def test_a_budget_of_which_nothing_can_follow_is_warned_of(call, words, lack):
    result = call("train", "--run", "pilot", *epsilon(1), *words)
    assert result.exit_code == 0
    assert f"raise --ledger-{lack}" in result.stderr


def test_a_budget_without_words_is_the_runs_own(call):
    answer(call("train", "--run", "pilot", *epsilon(1)))
    refused(
        call("train", "--run", "final", *epsilon(2)), "what other studies leave of the dataset's 1"
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--ledger-epsilon", 4],
        ["has another epsilon", "got 4", "3, which it was made with", "2 of it", "ledger extend"]),
        (["--ledger-delta", 1e-4],
        ["has another delta", "got 0.0001", "2e-05 of it", "leave the budget out"]),
        (["--ledger-epsilon", 0], ["--ledger-epsilon", "0 <"]),
        (["--ledger-epsilon", "nan"], ["--ledger-epsilon"]),
        (["--ledger-delta", 2], ["--ledger-delta"]),
    ],
)  # fmt: skip
def test_a_ledger_with_another_budget_is_told_and_left_alone(call, words, parts):
    where = answer(call("train", "--run", "pilot", *epsilon(1), "--ledger-epsilon", 3))["ledger"]
    before = verify(where).head
    refused(call("train", "--run", "final", *epsilon(1), *words), *parts)
    assert verify(where).head == before
    answer(call("train", "--run", "final", *epsilon(1), "--ledger-epsilon", 3))


def test_a_budget_below_the_run_is_refused_and_leaves_nothing(call, tmp_path):
    refused(call("train", *epsilon(2), "--ledger-epsilon", 1), "costs too much")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_budget_is_raised_for_a_reason_alone(call):
    found = answer(call("train", "--run", "pilot", *epsilon(1)))
    where = found["ledger"]
    for words, part in [
        ([], "needs a budget"),
        (["--epsilon", 3], "stated reason"),
        (["--epsilon", 0.5, "--reason", "x"], "can only be raised"),
        (["--epsilon", 1, "--reason", "x"], "can only be raised"),
        (["--epsilon", "inf", "--reason", "x"], "not a finite number"),
    ]:
        refused(call("ledger", "extend", where, *words), part)
    assert verify(where).entries == found_entries(call, where)
    raised = call(
        "ledger",
        "extend",
        "runs/pilot",
        "--epsilon",
        3,
        "--delta",
        "3e-5",
        "--reason",
        "final run, agreed by the board",
    )
    assert "epsilon 3, delta 3e-05 from now on" in raised.stdout
    assert "left for further studies: epsilon 2, delta 2e-05" in raised.stdout
    assert answer(call("train", "--run", "final", *epsilon(2)))["ledger"] == where
    for words in (["show", where], ["show", "runs/final"], ["list"]):
        assert "final run, agreed by the board" in call("ledger", *words).stdout
    assert (
        answer(call("ledger", "show", where, "--json"))["extensions"][0]["reason"]
        == "final run, agreed by the board"
    )
    assert call("ledger", "verify", "runs/pilot").exit_code == 0


def found_entries(call, where):
    return answer(call("ledger", "show", where, "--json"))["entries"]


def test_a_run_leads_to_its_ledger(call, tmp_path):
    found = answer(call("train", "--run", "r"))
    shown = answer(call("ledger", "show", "runs/r", "--json"))
    assert shown["ledger"] == found["ledger"]
    assert shown["run"] == {"name": "r", "study": "r", "attempts": 1, "used": 12}
    assert call("ledger", "show", "runs/r").stdout.startswith(
        "run r: 12 steps charged in 1 attempts, to study r of "
    )
    (tmp_path / "runs" / "r" / "run.json").write_text("{")
    refused(call("ledger", "show", "runs/r"), "run.json of the run is damaged")


def test_a_list_without_ledgers_and_one_with_a_lost_one(call):
    assert "no ledger is known" in call("ledger", "list").stdout
    where = answer(call("train", "--run", "r"))["ledger"]
    shutil.rmtree(where)
    assert "there is no ledger" in call("ledger", "list").stdout
    (row,) = answer(call("ledger", "list", "--json"))["ledgers"]
    assert "there is no ledger" in row["problem"]


def test_training_without_a_guarantee_is_said_outright_and_marked(call, tmp_path):
    words = ["--run", "r", "--set", "method.name=none"]
    refused(call("train", *words), "method.name", "task.public=true", "--not-private")
    assert list(tmp_path.iterdir()) == []
    result = call("train", *words, "--not-private")
    assert answer(result)["private"] is False
    assert "NOT PRIVATE" in result.stdout
    exported = call("export", "runs/r", "out", "--trust-module", "tests.support.tiny")
    assert "NOT PRIVATE" in exported.stdout
    assert json.loads((tmp_path / "out" / "privacy.json").read_text())["private"] is False
    refused(call("ledger", "show", "runs/r"), "the run has no ledger")
    resumed = call("resume", "runs/r", "--trust-module", "tests.support.tiny", "--json")
    assert answer(resumed)["private"] is False
    public = call("train", "--run", "p", "--set", "method.name=none", "--set", "task.public=true")
    assert answer(public)["private"] is False


def test_records_that_a_ledger_protects_are_not_public_by_a_word(call):
    answer(call("train", "--run", "r"))
    refused(
        call("train", "--run", "p", "--set", "method.name=none", "--set", "task.public=true"),
        "--not-private",
    )


def test_an_export_says_what_was_promised(call, tmp_path):
    assert answer(call("train", "--run", "r", *epsilon(2)))["private"] is True
    assert (
        "NOT" not in call("export", "runs/r", "out", "--trust-module", "tests.support.tiny").stdout
    )
    promise = json.loads((tmp_path / "out" / "privacy.json").read_text())
    assert (
        promise["private"],
        promise["epsilon"],
        promise["delta"],
        promise["study"],
        promise["steps"],
    ) == (True, 2.0, 1e-5, "r", 12)


def test_a_delta_that_gives_records_away_is_said_outright(call, tmp_path):
    large = ["--set", "privacy.delta=0.005"]  # of 200 records
    refused(
        call("train", "--run", "r", *large),
        "privacy.delta",
        "got '0.005'",
        "below 1 / 200 = 0.005",
        "--allow-large-delta",
    )
    refused(
        call("train", "--run", "r", "--ledger-delta", 0.5),
        "the delta of the dataset's ledger",
        "--allow-large-delta",
    )
    assert list(tmp_path.iterdir()) == []
    answer(call("train", "--run", "r", *large, "--allow-large-delta"))
    other = ["--run", "p", "--ledger", "other", "--second-ledger"]
    assert answer(call("train", *other, "--set", "privacy.delta=0.0049"))["delta"] == 0.0049


def test_a_sweep_with_such_a_delta_is_refused_as_well(call, tmp_path):
    words = [
        "tune",
        "tests.support.tiny_space",
        "--budget-delta",
        0.5,
        "--trials",
        2,
        "--storage",
        "sweeps",
        "--key-file",
        tmp_path / "key",
    ]
    refused(call(*words), "the sweep's delta", "--allow-large-delta")
    words[3] = 1e-5
    refused(
        call(*words, "--ledger-delta", 0.5),
        "the delta of the dataset's ledger",
        "--allow-large-delta",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("assignment", "part"),
    [("privacy.epsilon=20", None),
    ("privacy.epsilon=21", "warning: privacy.epsilon 21 guarantees next to nothing"),
     ("privacy.expected_batch_size=16", None),
     ("privacy.expected_batch_size=15", "warning: privacy.expected_batch_size 15 is small")],
)  # fmt: skip
def test_what_promises_or_learns_little_is_warned_of(call, assignment, part):
    result = call("train", "--run", "r", "--set", assignment)
    assert result.exit_code == 0
    warned = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert [part in line for line in warned] == ([True] if part else [])


def test_a_list_names_the_table_of_a_task_that_has_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.parquet").touch()
    assert label(SimpleNamespace(name="t", data="train.parquet")) == f"t ({tmp_path}/train.parquet)"
    assert label(SimpleNamespace(name="t", data="hf://a/b")) == "t (hf://a/b)"
    assert label(SimpleNamespace(name="t")) == label(SimpleNamespace(name="t", data=3)) == "t"
