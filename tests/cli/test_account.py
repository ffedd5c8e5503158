"""``grape-ray account`` and ``ledger``: answers, errors, and what they do without."""

import json
import re
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from grape_ray.accounting import Mechanism
from grape_ray.cli.main import main
from grape_ray.ledger import Ledger, Study


def run(*arguments):
    return CliRunner().invoke(main, list(arguments))


def answer(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


COMMON = ("account", "--delta", "1e-5", "--sampling-prob", "1.0")


def test_noise_then_epsilon_then_steps_agree():
    noise = answer(*COMMON, "--epsilon", "3", "--steps", "300")
    assert set(noise) == {
        "noise_multiplier",
        "epsilon",
        "delta",
        "steps",
        "sampling_prob",
        "mechanism",
    }
    sigma = str(noise["noise_multiplier"])
    assert answer(*COMMON, "--noise-multiplier", sigma, "--steps", "300")[
        "epsilon"
    ] == pytest.approx(3.0, rel=1e-5)
    assert answer(*COMMON, "--noise-multiplier", sigma, "--epsilon", "3")["steps"] == 300


def test_batches_of_one_price_see_the_more_the_larger_they_are():
    words = ("--units", "15000", "--epochs", "4", "--epsilon", "3", "--delta", "1e-5")
    found = answer("batches", *words)
    rows = found["schedules"]
    assert all(row["batch"] * row["steps"] == pytest.approx(60_000, rel=0.05) for row in rows)
    assert [row["signal"] for row in rows] == sorted(row["signal"] for row in rows)
    for row in rows[:: len(rows) - 1]:
        prob, sigma = str(row["batch"] / 15000), str(row["noise_multiplier"])
        spent = answer("account", "--delta", "1e-5", "--sampling-prob", prob, "--noise-multiplier",
                       sigma, "--steps", str(row["steps"]))  # fmt: skip
        assert spent["epsilon"] == pytest.approx(3.0, rel=1e-3)
    assert found["advised_batch"] == 512
    shown = run("batches", *words).stdout
    assert re.search(r"^ +512 +117 .*<-$", shown, re.M)
    assert "a number > 0" in run("batches", *words[2:], "--units", "0").stderr


def test_plain_output_names_every_number():
    result = run(*COMMON, "--epsilon", "3", "--steps", "300")
    assert result.exit_code == 0
    assert "noise_multiplier" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--epsilon", "nan", "--steps", "3"), "epsilon is not a finite number"),
        (("--epsilon", "0", "--steps", "3"), "epsilon is out of range"),
        (("--epsilon", "-1", "--steps", "3"), "epsilon is out of range"),
        (("--epsilon", "1", "--steps", "0"), "steps is not a usable count"),
        (("--epsilon", "1", "--steps", "3", "--delta", "1"), "delta is out of range"),
        (
            ("--epsilon", "1", "--steps", "3", "--sampling-prob", "1.5"),
            "sampling_prob is out of range",
        ),
        (("--noise-multiplier", "inf", "--steps", "3"), "noise_multiplier is not a finite number"),
        (("--epsilon", "1"), "account computes one of three"),
        (
            ("--epsilon", "1", "--steps", "3", "--noise-multiplier", "1"),
            "account computes one of three",
        ),
        (
            ("--epsilon", "1", "--steps", "3", "--method", "randomized"),
            "probes of poisson_randomized",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, complaint):
    result = run(*COMMON, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert complaint in result.stderr


def test_an_unknown_command_gets_a_hint():
    result = run("acount")
    assert result.exit_code == 2
    assert "did you mean 'account'?" in result.stderr


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger.open(str(tmp_path / "ledger"), "data", 8.0, 1e-5)
    ledger.ensure_study(Study("s", Mechanism("poisson_gaussian", 1.0, 10.0), 4.0, 1e-6, 20))
    ledger.charge("s", "r", ledger.begin_attempt("s", "r", "id"), 0, 5)
    return tmp_path / "ledger"


def test_ledger_show(ledger):
    shown = answer("ledger", "show", str(ledger))
    assert shown["dataset_id"] == "data"
    assert shown["studies"]["s"]["left"] == 15
    assert shown["studies"]["s"]["runs"] == {"r": {"attempts": 1, "used": 5}}
    assert 0 < shown["studies"]["s"]["epsilon_spent"] < 4
    assert "5 of 20 steps charged" in run("ledger", "show", str(ledger)).stdout


def test_ledger_verify(ledger):
    assert answer("ledger", "verify", str(ledger))["ok"] is True
    assert run("ledger", "verify", str(ledger)).exit_code == 0
    (ledger / "00000001.json").unlink()
    broken = run("ledger", "verify", str(ledger), "--json")
    assert broken.exit_code == 2
    assert json.loads(broken.stdout.splitlines()[-1])["problems"][0] == "00000001.json: missing"
    assert run("ledger", "show", str(ledger)).exit_code == 2


@pytest.mark.parametrize("command", ["show", "verify"])
def test_no_ledger_there(tmp_path, command):
    result = run("ledger", command, str(tmp_path / "nothing"))
    assert result.exit_code == 2
    assert "there is no ledger" in result.stderr
    assert not (tmp_path / "nothing").exists()


def _loaded_after(code):
    heavy = {"torch", "ray", "scipy", "dp_accounting", "transformers"}
    tail = f"\nimport sys; print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"
    result = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, check=True, timeout=120
    )
    return result.stdout.splitlines()[-1]


def test_accounting_needs_neither_torch_nor_ray(ledger):
    assert _loaded_after("import grape_ray.accounting, grape_ray.storage") == "[]"
    call = (
        "from click.testing import CliRunner\nfrom grape_ray.cli.main import main\nassert"
        " CliRunner().invoke(main, {}).exit_code == 0"
    )
    account = [
        "account",
        "--epsilon",
        "3",
        "--delta",
        "1e-5",
        "--sampling-prob",
        "0.1",
        "--steps",
        "10",
    ]
    assert _loaded_after(call.format(account)) == "['scipy']"
    assert _loaded_after(call.format(["ledger", "verify", str(ledger)])) == "['scipy']"
    assert _loaded_after(call.format(["--help"])) == "[]"


def test_help_is_quick():
    walls_s = []
    for _ in range(3):
        started = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-c", "from grape_ray.cli.main import main; main(['--help'])"],
            capture_output=True,
            text=True,
        )
        walls_s.append(time.perf_counter() - started)
        assert "account" in result.stdout
    assert min(walls_s) < 1.0
