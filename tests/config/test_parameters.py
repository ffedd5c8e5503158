"""Parameters of a pipeline's function: given by `--set`, by a run file, and refused by name."""

import json
from typing import Literal

import pytest
from click.testing import CliRunner

from grape_ray.cli.main import main
from grape_ray.config.description import describe
from grape_ray.config.pipelines import pipeline
from grape_ray.errors import ConfigError
from tests.support.tiny import tiny

PIPELINE = "tests.config.test_parameters:sized"


def sized(size: Literal["base", "tiny"] = "base", steps: int = 12, slow=False, *more):
    """A run.

    Args:
        size: how large; `tiny` is small. steps: how many.
    """
    return tiny(3 if size == "tiny" else steps, slow_s=1.0 if slow else 0.0)


def test_parameters_come_before_fields_whatever_the_order():
    assert pipeline(PIPELINE).privacy.steps == 12
    assert pipeline(PIPELINE, ["size=tiny"]).privacy.steps == 3
    config = pipeline(PIPELINE, ["privacy.clip_norm=2", "steps=7", "seed=5", "slow=true"])
    assert (config.privacy.steps, config.privacy.clip_norm, config.seed) == (7, 2.0, 5)
    assert config.task.slow_s == 1.0
    assert pipeline(PIPELINE, ["privacy.steps=9", "size=tiny"]).privacy.steps == 9
    # A run is described by what came of it.
    assert describe(pipeline(PIPELINE, ["size=tiny"])) == describe(pipeline(PIPELINE, ["steps=3"]))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("siz=tiny", r"unknown key, got 'siz', .*size, steps, slow; did you mean 'size'"),
        ("size=tinny", "expected one of base, tiny; did you mean 'tiny'"),
        ("steps=few", "steps, got 'few', expected a value of type int"),
        ("sed=1", "did you mean 'seed'"),
        ("size", "key=value"),
        ("more=1", "unknown key"),
        ("method=grape", "a group is not a value"),
    ],
)
def test_what_is_wrong_is_told_with_the_nearest_names(assignment, message):
    with pytest.raises(ConfigError, match=f"^--set.*{message}"):
        pipeline(PIPELINE, [assignment])


def test_a_run_file_begins_with_a_pipeline(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"pipeline: {PIPELINE}\nsize: tiny\nmethod: {{betas: [0.8, 0.9]}}\ntask: {{records: 99}}\n"
    )
    config = pipeline(str(file))
    assert (config.privacy.steps, config.method.betas, config.task.records) == (3, (0.8, 0.9), 99)
    assert pipeline(str(file), ["size=base", "task.records=98"]).privacy.steps == 12
    for text, message in [
        (f"pipeline: {PIPELINE}\nsiz: tiny\n", r"run\.yaml: unknown key, got 'siz'.*'size'"),
        (f"pipeline: {PIPELINE}\nmethod: {{rnk: 3}}\n", r"run\.yaml: unknown key.*method\.rank"),
        ("pipeline: run.yaml\n", r"run\.yaml: pipeline, .*module:function"),
        ("pipeline: nowhere\n", "pipeline not found"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            pipeline(str(file))


def test_fields_lists_them_first():
    ran = CliRunner().invoke(main, ["fields", PIPELINE, "--set", "size=tiny", "--json"])
    assert ran.exit_code == 0, ran.output
    listed = {info["key"]: info for info in json.loads(ran.stdout.splitlines()[-1])}
    assert list(listed)[:3] == ["size", "steps", "slow"]
    assert listed["size"] == {
        "key": "size", "type": "base or tiny", "value": "tiny",
        "meaning": "how large; `tiny` is small.",
    }  # fmt: skip
    assert (listed["steps"]["value"], listed["privacy.steps"]["value"]) == (12, 3)
    assert listed["slow"]["type"] == "bool"
