"""A study: every combination over every seed, once, each under its own budget; figures are those of
the runs.
"""

import json

import pytest
from click.testing import CliRunner

from grape_ray.bench.study import StudyRun, summary
from grape_ray.cli.main import main
from grape_ray.errors import ConfigError

WORDS = (
    "bench", "study", "pipelines.digits_vit", "--vary", "method.name=grape,none", "--set",
    "privacy.steps=2", "--set", "privacy.expected_batch_size=64", "--json",
)  # fmt: skip


def call(*words):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.strip().rpartition("\n")[2])["runs"]


def test_a_study_is_every_case_once_and_goes_on_where_it_was_cut_off(tmp_path):
    folder, plot = tmp_path / "study", tmp_path / "study.svg"
    first = call(*WORDS, "--seeds", 1, "--folder", folder, "--plot", plot)
    assert [run["case"] for run in first] == [["grape"], ["none"]]
    assert first[0]["epsilon"] == pytest.approx(8, rel=1e-3)
    assert first[1]["epsilon"] is None
    assert all(run["cpu_s"] > 1 and run["peak_bytes"] > 1 << 20 for run in first)
    assert "<svg" in plot.read_text()
    log = folder / "study.jsonl"
    kept = log.read_text()
    log.write_text(kept + '{"case": ["gra')  # the machine died while it wrote
    results = tmp_path / "RESULTS.md"
    assert call(*WORDS, "--seeds", 1, "--folder", folder, "--out", results) == first
    said = results.read_text()
    assert " bench study pipelines.digits_vit --vary method.name=grape,none --set " in said
    assert str(tmp_path) not in said
    assert len(list((folder / "runs").iterdir())) == 2
    other = CliRunner().invoke(main, [*WORDS[:-1], "--set", "seed=1", "--folder", str(folder)])
    assert "one of this study" in other.stderr


def test_a_case_sets_several_fields_at_once(tmp_path):
    words = [
        "bench", "study", "pipelines.digits_vit", "--case", "full: method.name=bookkeeping",
        "--case", "small: method.name=grape method.rank=4", "--vary", "privacy.epsilon=3,8",
        "--set", "privacy.steps=1", "--set", "privacy.expected_batch_size=64", "--json",
        "--seeds", "1", "--folder", str(tmp_path),
    ]  # fmt: skip
    runs = call(*words)
    cases = [["full", "3"], ["full", "8"], ["small", "3"], ["small", "8"]]
    assert [run["case"] for run in runs] == cases
    assert [run["epsilon"] for run in runs] == pytest.approx([3, 8, 3, 8], rel=1e-3)
    plans = [json.loads(found.read_text()) for found in tmp_path.glob("runs/*/run.json")]
    methods = {(plan["method"]["name"], plan["method"]["rank"]) for plan in plans}
    assert ("grape", 4) in methods
    assert {name for name, _ in methods} == {"bookkeeping", "grape"}
    words[words.index("full: method.name=bookkeeping")] = "small: method.name=bookkeeping"
    refused = CliRunner().invoke(main, words)
    assert "each name once" in refused.stderr


def test_a_summary_has_mean_and_spread_over_seeds():
    runs = [
        StudyRun(("4",), seed, {"accuracy": value}, 10.0, 1 << 20, 3.0)
        for seed, value in enumerate((0.5, 0.7))
    ]
    columns, rows = summary(runs, {"method.rank": ["4", "16"]}, "accuracy")
    assert columns[:3] == ["rank", "accuracy", "sd"]
    assert rows == [["4", "0.6000", "0.1414", "0.500, 0.700", "10", "1"]]
    with pytest.raises(ConfigError, match=r"--metric.*did you mean 'accuracy'"):
        summary(runs, {"method.rank": ["4"]}, "acuracy")
