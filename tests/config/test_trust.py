"""A folder of runs or of a sweep may have been made by anyone: it has nothing imported, called or
unpickled that the user did not name.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from grape_ray.cli.main import main
from grape_ray.config.description import rebuild_task
from grape_ray.distributed.comms import Comms
from grape_ray.errors import ConfigError, StorageError
from grape_ray.ray_backend.sweep import resume as resume_sweep
from grape_ray.storage import Storage
from grape_ray.training.export import export
from grape_ray.training.resume import plan_resume
from grape_ray.training.run import execute
from grape_ray.tuning import folder, spaces
from grape_ray.tuning.options import Options
from grape_ray.tuning.prepare import prepare as prepare_sweep
from pipelines.digits_vit import digits_vit
from tests.support.plans import planned
from tests.support.tiny import Tiny, tiny

REPOSITORY = Path(__file__).parents[2]
STRANGE = [
    {"class": "subprocess:getoutput", "fields": {"cmd": "touch MARK"}},
    {"class": "subprocess:check_output", "fields": {"args": "touch MARK", "shell": True}},
    {"class": "os:system", "fields": {"command": "touch MARK"}},
    {"class": "tests.support.tiny:os.system", "fields": {"command": "touch MARK"}},
    {"class": "grape_ray.storage:Storage", "fields": {"url": "MARK"}},
    {"class": "grape_ray.config.schema:Privacy", "fields": {}},
    {"class": "grape_ray.tasks.task:Task", "fields": {}},
    {"class": "tests.support.tiny:tiny", "fields": {}},
    {"class": "tests.support.tiny:Tiny", "fields": {"unknown": 1}},
    {"class": "tests.support.tiny:Tiny.load", "fields": {"self": None}},
    {"class": "tests.support.tiny", "fields": {}},
]


@pytest.mark.parametrize("description", STRANGE, ids=lambda d: d["class"])
def test_a_description_names_nothing_but_a_task(description, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        rebuild_task(description)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["model", "data", "loss", "validation"])
def test_a_function_that_a_description_names_is_called_where_its_module_was_named_alone(
    field, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    mark, name = tmp_path / "MARK", f"stranger_{field}"
    (tmp_path / f"{name}.py").write_text(
        f"import pathlib, torch\npathlib.Path({str(mark)!r}).touch()\nmake = torch.nn.Identity\n"
    )
    fields = {"model": "", "data": "", "loss": "", field: f"{name}:make"}
    described = {"class": "grape_ray.tasks.functions:FunctionTask", "fields": fields}
    with pytest.raises(ConfigError, match=f"--trust-module {name}"):
        rebuild_task(described)
    with pytest.raises(ConfigError, match="--trust-module os"):  # imported, and not harmless
        rebuild_task({**described, "fields": {**fields, field: "os:abort"}})
    assert not mark.exists()
    assert getattr(rebuild_task(described, [name]), field) == f"{name}:make"


def published(tmp_path, module="stranger"):
    """A run whose task lies in a module of the current folder that leaves a mark when it is
    imported.
    """
    run = tmp_path / "runs" / "r"
    execute(
        planned(tiny(), run="r", storage=str(run.parent), key_path=str(tmp_path / "key")),
        Comms.local(),
    )
    described = json.loads((run / "run.json").read_text())
    described["task"]["class"] = f"{module}:Mine"
    (run / "run.json").write_text(json.dumps(described))
    text = (
        "import dataclasses, pathlib\nfrom tests.support.tiny import"
        f" Tiny\npathlib.Path({str(tmp_path / 'MARK')!r}).touch()\n"
    )
    (tmp_path / f"{module}.py").write_text(
        text + "@dataclasses.dataclass(frozen=True)\nclass Mine(Tiny):\n    pass\n"
    )
    return run


def program(words, cwd):
    code = "from grape_ray.cli.main import main; main()"
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_module_that_the_user_did_not_name_is_not_even_imported(tmp_path):
    run = published(tmp_path)
    for words in (
        ["export", run, tmp_path / "out"],
        ["resume", run, "--key-file", tmp_path / "key"],
    ):
        done = program(words, tmp_path)
        assert done.returncode == 2
        assert "--trust-module stranger" in done.stderr
        assert not (tmp_path / "MARK").exists()
    done = program(["export", run, tmp_path / "out", "--trust-module", "stranger"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "MARK").exists()


@pytest.mark.parametrize(
    "name", ["pipelines/digits_vit.py", "sklearn.py", "transformers.py", "safetensors.py"]
)
def test_files_beside_a_run_pass_for_nothing(tmp_path, name):
    """Who calls the program from within a folder that was copied from elsewhere has nothing of it
    imported.
    """
    run = tmp_path / "runs" / "r"
    execute(
        planned(
            digits_vit().override(["privacy.steps=1"]),
            run="r",
            storage=str(run.parent),
            key_path=str(tmp_path / "key"),
        ),
        Comms.local(),
    )
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for path in {
        tmp_path / name,
        (tmp_path / name).parent / ("__init__.py" if "/" in name else name),
    }:
        path.write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'MARK')!r}).touch()")
    # as the installed program, which has no '' there
    code = "import sys; sys.path.remove(''); from grape_ray.cli.main import main; main()"
    words = [sys.executable, "-c", code, "export", str(run), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "MARK").exists()


def test_libraries_name_trusted_modules_as_well(tmp_path, monkeypatch):
    run = published(tmp_path, "stranger_to_libraries")
    monkeypatch.syspath_prepend(str(tmp_path))
    for call in (lambda: export(str(run), tmp_path / "out"), lambda: plan_resume(str(run))):
        with pytest.raises(ConfigError, match=r"trust=\['stranger_to_libraries'\]"):
            call()
    assert export(str(run), tmp_path / "out", trust=["stranger_to_libraries"]) == 12


def test_what_is_trusted_is_a_module_and_those_below_it(tmp_path):
    with pytest.raises(ConfigError, match="not named"):
        rebuild_task({"class": "stranger2:Mine", "fields": {}}, trust=["stranger"])
    assert rebuild_task(
        {"class": "tests.support.tiny:Tiny", "fields": {"records": 150}}, trust=["tests"]
    ) == Tiny(records=150)


@pytest.mark.parametrize(
    "url", ["simplecache::file:///tmp/x", "reference::file:///tmp/x.json", "reference://"]
)
def test_a_location_is_no_chain_of_drivers(url):
    with pytest.raises(StorageError, match="chain of drivers"):
        Storage(url)


class _Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def sweep(tmp_path):
    """A sweep's folder as it is when it was cut off, with a state of Ray Tune that runs code when
    it is loaded.
    """
    words = {
        "storage": str(tmp_path / "sweeps"),
        "key_path": str(tmp_path / "key"),
        "scheduler": "none",
        "trials": 1,
    }
    begun = prepare_sweep(
        Options("tests.support.tiny_space", **words), *spaces.load("tests.support.tiny_space"), "a"
    )
    begun.register()
    state = tmp_path / "sweeps" / "a" / folder.TUNE
    state.mkdir()
    (state / "tuner.pkl").write_bytes(pickle.dumps(_Bomb(str(tmp_path / "MARK"))))
    return tmp_path


def test_pickles_of_a_sweep_that_others_began_are_not_loaded(sweep, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(sweep / "another-user"))
    with pytest.raises(ConfigError, match="--trust-state"):
        resume_sweep(str(sweep / "sweeps"), "a", {}, print)
    shown = CliRunner().invoke(
        main,
        ["tune", "tests.support.tiny_space", "--resume", "a", "--storage", str(sweep / "sweeps")],
    )
    assert shown.exit_code == 2
    assert "--trust-state" in shown.stderr
    assert not (sweep / "MARK").exists()


def test_a_sweep_put_in_the_place_of_ones_own_is_not_ones_own(sweep):
    path = sweep / "sweeps" / "a" / "sweep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mark": "0" * 32}))
    with pytest.raises(ConfigError, match="--trust-state"):
        resume_sweep(str(sweep / "sweeps"), "a", {}, print)


def test_a_sweeps_description_has_no_module_imported_and_no_key_of_its_own_used(sweep, monkeypatch):
    path = sweep / "sweeps" / "a" / "sweep.json"
    described = json.loads(path.read_text())
    monkeypatch.syspath_prepend(str(sweep))
    (sweep / "strange_space.py").write_text(
        f"import pathlib; pathlib.Path({str(sweep / 'MARK')!r}).touch()"
    )
    path.write_text(
        json.dumps({**described, "options": {**described["options"], "space": "strange_space"}})
    )
    with pytest.raises(ConfigError, match="--trust-module strange_space"):
        resume_sweep(str(sweep / "sweeps"), "a", {}, print)
    assert not (sweep / "MARK").exists()
    inside = str(sweep / "sweeps" / "a" / "key")
    path.write_text(
        json.dumps({**described, "options": {**described["options"], "key_path": inside}})
    )
    with pytest.raises(ConfigError, match="master key lies inside"):
        resume_sweep(str(sweep / "sweeps"), "a", {}, print)


def test_a_selection_that_others_began_is_not_gone_on_with(tmp_path, monkeypatch):
    words = {
        "storage": str(tmp_path / "sweeps"),
        "key_path": str(tmp_path / "key"),
        "mode": "select",
        "scheduler": "none",
    }
    prepare_sweep(
        Options("tests.support.tiny_space", **words), *spaces.load("tests.support.tiny_space"), "a"
    ).register()
    path = tmp_path / "sweeps" / "a" / "sweep.json"
    mine = tmp_path / "mine"
    (mine / "runs").mkdir(parents=True)
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "sealed": str(mine), "mark": "0" * 32})
    )
    with pytest.raises(ConfigError, match="--trust-state"):
        resume_sweep(str(tmp_path / "sweeps"), "a", {}, print)
    assert (mine / "runs").exists()
