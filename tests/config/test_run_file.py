"""Runs as YAML files: the same fields, the same checks and the same nearest names as on the command
line.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from grape_ray.config.fields import fields_of
from grape_ray.config.pipelines import pipeline
from grape_ray.config.schema import Config
from grape_ray.errors import ConfigError
from grape_ray.models.adapters import Lora

WHOLE = """
task:
  kind: text-classification
  model: some/model
  data: tickets.csv
  labels: [no, 007]
  class_weights: [1, 2.5]
  lora: {rank: 4, targets: [query, value]}
privacy: {epsilon: 3, delta: 1e-6, noise_multiplier: null, unit: user}
method:
  betas: [0.9, 0.99]
  learning_rate: 1e-3
performance:
  num_workers: 2:8
seed: 7
"""


def write(folder, text):
    (folder / "run.yaml").write_text(text)
    return str(folder / "run.yaml")


def test_a_file_says_what_a_pipeline_can(tmp_path):
    config = pipeline(write(tmp_path, WHOLE))
    assert isinstance(config, Config)
    assert config.task.labels == ("no", "007")
    assert config.task.class_weights == (1.0, 2.5)
    assert config.task.lora == Lora(rank=4, targets=("query", "value"))
    assert (config.privacy.epsilon, config.privacy.delta, config.privacy.unit) == (
        3.0,
        1e-6,
        "user",
    )
    assert config.method.betas == (0.9, 0.99)
    assert (config.performance.workers, config.seed) == ((2, 8), 7)
    assert config.override(["task.max_tokens=9"]).task.max_tokens == 9


def test_paths_beside_the_file_are_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "tickets.csv").write_text("text,label\n")
    path = write(tmp_path, WHOLE)
    assert pipeline(path).task.data == str(tmp_path / "tickets.csv")
    monkeypatch.chdir(tmp_path)  # where the name as it is finds it, on every machine of a job
    assert pipeline("run.yaml").task.data == "tickets.csv"


def test_a_task_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    path = write(tmp_path, "task: {kind: 'pipelines.digits_vit:DigitsVit', width: 32}")
    assert pipeline(path).task.width == 32


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["run.yaml", "task, privacy"]),
        ("task: [", ["cannot be read", "line 1"]),
        ("privacy: {epsilon: 3}", ["task.kind", "text-classification"]),
        ("task: {kind: text-clasification}", ["did you mean 'text-classification'"]),
        ("task: {kind: text-classification, model: m}", ["task.data", "write `data:`"]),
        (WHOLE.replace("epsilon", "epsilom"), ["run.yaml:", "did you mean 'privacy.epsilon'"]),
        (WHOLE.replace("labels:", "label:"), ["task.label'", "did you mean 'task.labels'"]),
        (WHOLE.replace("epsilon: 3", "epsilon: much"), ["privacy.epsilon", "'much'", "float"]),
        (WHOLE.replace("epsilon: 3", "epsilon: -3"), ["privacy.epsilon", "> 0"]),
        (WHOLE.replace("rank: 4", "rnk: 4"), ["task.lora.rnk", "task.lora.rank"]),
        (WHOLE.replace("seed: 7", "sed: 7"), ["unknown key", "'sed'", "seed"]),
        (WHOLE.replace("method:\n", "method: grape\nx:\n"), ["a group is not a value", "method"]),
        (WHOLE.replace("some/model", "[1, 2]\n  nothing: 3"), ["task.nothing"]),
        ("task: {kind: 'nowhere:Task'}", ["task not found", "nowhere"]),
    ],
)
def test_what_is_wrong_is_said_with_the_files_name(tmp_path, text, parts):
    with pytest.raises(ConfigError) as caught:
        pipeline(write(tmp_path, text))
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    write(tmp_path, WHOLE)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        pipeline(str(tmp_path / "rum.yaml"))


def test_a_package_of_ones_own_called_pipelines_hides_none_of_ours(tmp_path):
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("")
    mine = "from pipelines.digits_vit import digits_vit as mine\n"
    (tmp_path / "pipelines" / "mine.py").write_text(mine)
    program = str(Path(sys.executable).with_name("grape-ray"))

    def fields(name):
        words = [program, "fields", name, "task.width"]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)

    for name in ("pipelines.digits_vit", "pipelines.mine"):
        assert fields(name).stdout.startswith("task.width = 64"), fields(name).stderr
    assert "did you mean 'pipelines.digits_vit'" in fields("pipelines.digit_vit").stderr


@pytest.mark.parametrize("name", ["sst2", "opt", "longcontext_llama", "digits_vit"])
def test_every_field_of_the_pipelines_has_a_meaning(name):
    unsaid = [info.key for info in fields_of(pipeline(f"pipelines.{name}")) if not info.meaning]
    assert set(unsaid) <= {"task.name"}
