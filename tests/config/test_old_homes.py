"""What was written before modules moved is still read: runs name their task's class, and Ray Tune
pickles a sweep's callbacks.
"""

import json
import pickle
import sys

import pytest

from grape_ray.config.description import read_run, rebuild_task
from grape_ray.errors import ConfigError
from grape_ray.ray_backend.old_homes import old_homes
from grape_ray.storage import Storage
from grape_ray.tasks.text_classification import TextClassification


def test_a_task_is_found_where_it_lives_now(tmp_path):
    described = {
        "class": "grape_ray.models.text_classification:TextClassification",
        "fields": {"model": "m", "train": "a", "validation": "b"},
    }
    rest = {"run": "r", "ledger": None, "study": "r", "seed": 0, "privacy": {}, "method": {}}
    (tmp_path / "run.json").write_text(json.dumps({**rest, "task": described}))
    assert isinstance(rebuild_task(read_run(Storage(tmp_path))["task"]), TextClassification)
    with pytest.raises(ConfigError, match="task not found"):
        rebuild_task(described)


def test_a_pickle_finds_its_class_for_the_time_of_a_block_alone():
    frozen = b"\x80\x04\x8c\x19grape_ray.orchestrate.tune\x94\x8c\x07_Teller\x94\x93\x94.".replace(
        b"\x19", b"\x1a"
    )
    with old_homes(_Teller=dict):
        assert pickle.loads(frozen) is dict
    assert "grape_ray.orchestrate" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(frozen)
