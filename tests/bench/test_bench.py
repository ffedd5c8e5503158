"""The benchmarks run, in real processes and on a tiny model, and report in the promised shape;
nothing here asserts a time.
"""

import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from grape_ray.bench.candidates import CANDIDATES, chosen
from grape_ray.bench.report import save
from grape_ray.cli.main import main
from grape_ray.config.methods import METHODS
from grape_ray.errors import ConfigError


def run(*words):
    done = CliRunner().invoke(main, ["bench", *words, "--model", "tiny", "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_random_numbers_are_counted_by_kind_and_threads():
    done = CliRunner().invoke(
        main, ["bench", "random", "--count", "5000", "--rounds", "2", "--json"]
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert len({row["kind"] for row in rows}) == 3
    assert len({(row["kind"], row["threads"]) for row in rows}) == len(rows)
    assert all(row["per_s"] > 0 and row["cost_ns"] > 0 for row in rows)


def test_a_large_model_takes_a_private_step_beside_its_plan():
    """The real path at a tiny size; opt-6.7b has its section in RESULTS.md."""
    words = ["large", "--model", "opt-tiny", "--rank", "16", "--tokens", "16", "--json"]
    done = CliRunner().invoke(main, ["bench", *words])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout.splitlines()[-1])
    assert 0 < facts["weights_bytes"] < facts["planned_bytes"] < facts["peak_bytes"]
    assert math.isfinite(facts["loss"])
    assert facts["released_norm"] == pytest.approx(facts["noise_norm"], rel=0.05)
    assert facts["step_s"] > 0
    done = CliRunner().invoke(main, ["bench", "large", "--model", "opt-6.7"])
    assert "opt-6.7b" in done.output


@pytest.mark.slow
def test_methods_reports_the_promised_shape(tmp_path):
    out = tmp_path / "RESULTS.md"
    facts = run(
        "methods",
        "--methods",
        "floor,grape:4,bookkeeping,opacus_hooks",
        "--rounds",
        "2",
        "--out",
        str(out),
    )
    assert facts["model"] == "tiny"
    assert {"hardware", "versions", "commit"} <= facts.keys()
    rows = {r["method"]: r for r in facts["rows"]}
    assert [r["method"] for r in facts["rows"]] == [
        "none",
        "floor",
        "grape",
        "bookkeeping",
        "opacus_hooks",
    ]
    assert rows["none"]["time_ratio"] == 1.0
    assert rows["none"]["memory_ratio"] == 1.0
    assert rows["grape"]["rank"] == 4
    for name in ("floor", "grape", "bookkeeping"):
        assert rows[name]["seconds"] > 0
        assert rows[name]["peak_bytes"] >= 0
    if importlib.util.find_spec("opacus") is None:
        assert "not installed" in rows["opacus_hooks"]["error"]
        assert rows["opacus_hooks"]["seconds"] is None
    assert "| `grape` | 4 |" in out.read_text()


@pytest.mark.slow
def test_profile_accounts_for_time_and_bytes():
    facts = run("profile", "--methods", "grape:4,ghost", "--steps", "2")
    grape = next(r for r in facts["rows"] if r["method"] == "grape:4")
    assert {"forward", "backward", "noise", "optimizer"} <= grape["phases"].keys()
    assert grape["phases"]["forward"] > 0
    assert grape["bytes"]["clipped sum"] > 0


@pytest.mark.slow
def test_length_reports_every_method_at_every_length():
    facts = run("length", "--methods", "none,randomized", "--lengths", "8,16")
    assert [(r["tokens"], r["method"]) for r in facts["rows"]] == [
        (8, "none"),
        (8, "randomized"),
        (16, "none"),
        (16, "randomized"),
    ]


@pytest.mark.parametrize(
    "words",
    [("comm", "--rank", "5000"), ("scaling", "--rank", "5000"), ("length", "--lengths", "8,b")],
)
def test_what_cannot_be_measured_is_one_line(words):
    done = CliRunner().invoke(main, ["bench", *words, "--model", "tiny"])
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert "expected" in done.output


@pytest.mark.slow
@pytest.mark.ray
def test_shell_measures_starts_and_steps():
    done = CliRunner().invoke(main, ["bench", "shell", "--steps", "3", "--rounds", "1", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["help_s"] > 0
    assert facts["step_ratio"] > 0
    assert set(facts["start_s"]) == {"0", "1"}


@pytest.mark.slow
def test_comm_counts_what_two_ranks_send():
    facts = run("comm", "--rank", "4")
    assert facts["rank"] == 4
    assert 0 < facts["bytes_per_step"]["grape"] < facts["bytes_per_step"]["dp_adam"]


def test_a_section_is_replaced_and_others_are_kept(tmp_path):
    path = tmp_path / "RESULTS.md"
    save("One", "first", "cmd", path)
    save("Two", "other", "cmd", path)
    save("One", "second", "cmd", path)
    text = path.read_text()
    assert "first" not in text
    assert text.index("other") < text.index("second")
    assert text.count("## One") == 1


def test_every_method_has_a_candidate_and_unknown_ones_are_named():
    assert {n for n, info in METHODS.items() if info.private} <= CANDIDATES.keys()
    assert chosen(["grape:8"]) == [("none", None), ("grape", 8)]
    for wrong in ("grap", "ghost:4", "grape:x"):
        with pytest.raises(ConfigError):
            chosen([wrong])


def test_checkpoint_reports_the_rate_and_the_bytes(tmp_path):
    words = [
        "--rank",
        "4",
        "--rounds",
        "2",
        "--block",
        "6",
        "--every",
        "3",
        "--storage",
        str(tmp_path / "run"),
    ]
    facts = run("checkpoint", *words)
    assert facts["rate"] > 0
    # two in each of the two blocks, and two in the one that warms up
    assert facts["written"] + facts["skipped"] == 6
    assert 0 < facts["delta_bytes"] < facts["full_bytes"]


def test_the_model_of_scaling_counts_what_is_really_reduced():
    import torch
    import transformers

    from grape_ray.bench.scaling import sizes
    from grape_ray.engines.subspace import owned_parameters, plan_projections

    config = transformers.OPTConfig(
        hidden_size=2048,
        num_hidden_layers=24,
        ffn_dim=8192,
        num_attention_heads=32,
        word_embed_proj_dim=2048,
        max_position_embeddings=2048,
    )
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(config)
    plan, owned = plan_projections(model, 16, "in"), owned_parameters(model)
    reduced = sum(
        math.prod(plan[n].shape) if n in plan else p.numel() for n, (_, p) in owned.items()
    )
    parameters, coordinates = sizes("OPT-1.3B")
    assert parameters == pytest.approx(sum(p.numel() for _, p in owned.values()), rel=1e-3)
    assert coordinates == pytest.approx(reduced, rel=0.01)


def test_the_documented_table_of_scaling_is_the_model_s():
    from grape_ray.bench.scaling import H100, exchange_s, modelled

    page = Path(__file__).parents[2] / "docs" / "scaling.md"
    if os.environ.get("GRAPE_RAY_WRITE_DOCS"):
        head = page.read_text().split("| model, rank |")[0]
        page.write_text(head + modelled())
    assert page.read_text().endswith(modelled())
    # half there, half back
    assert exchange_s(10**9, 2, H100) == pytest.approx(10**9 * 4 / H100.inside, rel=0.01)


def test_ledger_reports_costs_for_each_number_of_entries():
    done = CliRunner().invoke(main, ["bench", "ledger", "--entries", "40,80", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["entries"] for row in rows] == [40, 80]
    assert all(row[name] >= 0 for row in rows for name in ("open_s", "verify_s", "epsilon_spent_s"))
    refused = CliRunner().invoke(main, ["bench", "ledger", "--entries", "many"])
    assert refused.exit_code == 2
    assert "comma list of integers" in refused.stderr
