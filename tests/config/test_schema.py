"""The frozen config: overrides by name, refusals that name the nearest, and pipelines found by
name.
"""

import dataclasses
import json

import pytest

from grape_ray.config.description import describe, rebuild_task
from grape_ray.config.pipelines import pipeline
from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.errors import ConfigError
from tests.support.tiny import Tiny, tiny


def test_overrides_reach_every_group_and_keep_types():
    config = tiny().override(
        [
            "privacy.epsilon=3", "privacy.noise_multiplier=none", "method.betas=0.8,0.9",
            "method.dense=*emb*,head.*", "performance.use_gpu=true", "task.records=120", "seed=7",
        ]
    )  # fmt: skip
    assert config.privacy.epsilon == 3.0
    assert isinstance(config.privacy.epsilon, float)
    assert config.method.betas == (0.8, 0.9)
    assert config.method.dense == ("*emb*", "head.*")
    assert (config.performance.use_gpu, config.task.records, config.seed) == (True, 120, 7)
    for text, dense in [
        ("[!c]*", ("[!c]*",)), ("[!c]*,*[01,2].w", ("[!c]*", "*[01,2].w")),
        ('["[!c]*", "a,b"]', ("[!c]*", "a,b")), ("(a, [b]?)", ("a", "[b]?")), ("[]", ()), ("", ()),
        ("()", ()),
    ]:  # fmt: skip
        assert tiny().override([f"method.dense={text}"]).method.dense == dense
    assert tiny().override(["method.betas=[0.8, 0.9]"]).method.betas == (0.8, 0.9)
    assert tiny().seed == 0  # frozen: the original is as it was


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("method.rnk=8", r"did you mean 'method\.rank'"),
        ("task.recrods=8", r"did you mean 'task\.records'"),
        ("privcy.epsilon=8", "did you mean 'privacy'"),
        ("method.rank=eight", "a value of type int"),
        ("method.rank=8.5", "a value of type int"),
        ("method=grape", "a group is not a value"),
        ("seed.x=1", "no fields of its own"),
        ("method.rank", "key=value"),
        ("method.name=grap", "did you mean 'grape'"),
        ("privacy.epsilon=nan",
        r"privacy\.epsilon, got nan, expected a finite number > 0; typical values"),
        ("privacy.epsilon=-inf", r"privacy\.epsilon, got -inf, expected a finite number > 0"),
        ("privacy.noise_multiplier=inf", r"privacy\.noise_multiplier, got inf"),
        ("privacy.steps=nan", "a value of type int"),
        ("privacy.delta=1", "well below one over the number of records"),
        ("privacy.steps=0", "how many optimizer steps"),
        ("privacy.expected_batch_size=0", "at most the number of records"),
        ("method.rank=0", "between 8 and 64"),
        ("performance.num_workers=-1", "0 trains in this process"),
    ],
)  # fmt: skip
def test_a_wrong_assignment_is_told_with_the_nearest_names(assignment, message):
    with pytest.raises(ConfigError, match=message):
        tiny().override([assignment])


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (Privacy, {"epsilon": 0}), (Privacy, {"epsilon": float("nan")}),
        (Privacy, {"epsilon": float("inf")}), (Privacy, {"delta": 1.0}), (Privacy, {"delta": 0}),
        (Privacy, {"steps": 0}), (Privacy, {"steps": 1.5}), (Privacy, {"expected_batch_size": 0}),
        (Privacy, {"clip_norm": -1}), (Privacy, {"noise_multiplier": 0}),
        (Privacy, {"noise_multiplier": float("nan")}), (Method, {"rank": 0}),
        (Method, {"learning_rate": 0}), (Method, {"betas": (0.9, 1.0)}),
        (Method, {"moments": "kept"}), (Method, {"rates": ("a.*",)}),
        (Method, {"rates": (":2",)}), (Method, {"rates": ("a.*:-1",)}),
        (Performance, {"num_workers": -1}),
        (Performance, {"num_workers": "0:0"}), (Performance, {"num_workers": "0:2"}),
        (Performance, {"charge_chunk": 0}), (Performance, {"micro_batch_size": True}),
        (Performance, {"start_timeout_s": float("inf")}),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(make, changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        make(**changes)


def test_performance_is_no_part_of_a_runs_description():
    fast = dataclasses.replace(tiny(), performance=Performance(num_workers=4, micro_batch_size=1))
    assert describe(fast) == describe(tiny())
    assert describe(tiny().override(["privacy.clip_norm=2"])) != describe(tiny())


def test_a_task_is_rebuilt_from_its_description():
    description = json.loads(json.dumps(describe(Config(Tiny(records=77)))))
    assert rebuild_task(description["task"]) == Tiny(records=77)
    with pytest.raises(ConfigError, match="rebuilt"):
        rebuild_task({"class": "tests.support.tiny:Tiny", "fields": {"no": 1}})


def test_pipelines_are_found_by_module_function_and_folder(tmp_path, monkeypatch):
    assert pipeline("pipelines.digits_vit") == pipeline("pipelines.digits_vit:digits_vit")
    assert pipeline("pipelines.sst2").privacy.epsilon == 3.0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_run.py").write_text(
        "from tests.support.tiny import tiny\ndef config():\n    return tiny(5)\n"
    )
    assert pipeline("my_run").privacy.steps == 5
    assert pipeline("my_run:tiny").privacy.steps == 12
    for name, message in [
        ("pipelines.digit_vit", r"did you mean 'pipelines\.digits_vit'"),
        ("no_such_module", "not found"),
        ("my_run:confg", "did you mean 'config'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            pipeline(name)
    (tmp_path / "broken_run.py").write_text("def config(:\n")
    with pytest.raises(ConfigError, match="SyntaxError"):
        pipeline("broken_run")
    (tmp_path / "wrong_run.py").write_text("def config():\n    return 3\n")
    with pytest.raises(ConfigError, match=r"returns a grape_ray\.Config"):
        pipeline("wrong_run")
