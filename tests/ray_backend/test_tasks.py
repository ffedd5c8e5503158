"""Each task on two Ray workers, from generated records and a run file to answers for new ones."""

import json

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner

from grape_ray.cli.main import main
from grape_ray.config.kinds import KINDS
from tests.support.every_task import CASES, RECORDS, save_models

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root


def call(*words):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.parametrize("kind", KINDS)
def test_from_records_to_answers(kind, models, tmp_path, monkeypatch, ray_cluster):
    monkeypatch.chdir(tmp_path)
    case = CASES[kind]
    records = case.records(tmp_path)
    task = {"kind": kind, "model": str(models / case.model), "data": str(records)}
    task |= {"held_out": 0.25, "held_out_public": True, **case.fields}
    said = {
        "task": task,
        "privacy": {"epsilon": 8.0, "delta": 1e-3, "expected_batch_size": 16, "steps": 2},
        "method": {"rank": 4, "project_min_numel": 256},
        "performance": {"micro_batch_size": 8, "threads_per_worker": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(said))
    told = call("train", "run.yaml", "--workers", 2, "--run", "t", "--key-file", "home/key")
    assert "2 workers" in told
    result = json.loads((tmp_path / "runs" / "t" / "result.json").read_text())
    assert (result["private"], result["steps"], result["workers"]) == (True, 2, 2)
    assert 0 < result["epsilon_spent"] <= 8
    assert set(case.metrics) <= set(result["metrics"])

    call("export", "runs/t", "model")
    assert "epsilon 8" in (tmp_path / "model" / "README.md").read_text()
    auto = getattr(transformers, f"AutoModelFor{case.auto}")
    loaded, info = auto.from_pretrained("model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    before = auto.from_pretrained(models / case.model).state_dict()
    after = loaded.state_dict()
    assert any(name in before and not torch.equal(before[name], after[name]) for name in after)

    call("predict", "model", records, "--out", "answers.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == RECORDS
    assert all(set(case.answers) == set(answer) for answer in answers)
