"""A matrix of inputs that are wrong in one thing: each costs one line that says what, got, expected
and a fix, and nothing else.

Nothing is written (storage, ledgers, keys and the user's own folders are compared before and
after), and so nothing is charged.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from grape_ray.cli.main import main
from grape_ray.ledger.ledger import Ledger
from tests.support.bad_inputs import make_models, make_pipelines, make_tables

REPOSITORY = Path(__file__).parents[2]

# (name, assignments of pipelines.sst2, what the line must say); W is the folder of inputs.
MODELS = [
    ("no tokenizer, BERT", ["task.model=W/models/notok-bert"], "has no tokenizer"),
    ("no tokenizer, RoBERTa", ["task.model=W/models/notok-roberta"], "has no tokenizer"),
    ("torn tokenizer", ["task.model=W/models/torntokenizer"], "cannot be loaded"),
    (
        "a head for other classes",
        ["task.model=W/models/head3"],
        "'3 labels', expected task.classes = 2",
    ),
    ("truncated weights", ["task.model=W/models/truncated"], "cannot be loaded"),
    ("a pointer in place of weights", ["task.model=W/models/pointer"], "cannot be loaded"),
    ("no weights", ["task.model=W/models/noweights"], "cannot be loaded"),
    (
        "a tensor missing",
        ["task.model=W/models/missing"],
        "bert.encoder.layer.0.attention.self.query.weight missing, one of 1",
    ),
    ("tensors of other names", ["task.model=W/models/othernames"], "missing, one of"),
    (
        "numbers that are not finite",
        ["task.model=W/models/nan"],
        "encoder.layer.0.output.dense.bias is not finite",
    ),
    ("tensors of other shapes", ["task.model=W/models/mismatched"], "do not fit"),
    (
        "fewer rows than tokens",
        ["task.model=W/models/fewrows"],
        "'80 rows', expected one for each of its tokenizer's 95 tokens",
    ),
    (
        "fewer positions than tokens",
        ["task.model=W/models/short", "task.data=W/tables/long.parquet"],
        "at most its 16 positions",
    ),
    (
        "fewer positions, in validation alone",
        ["task.model=W/models/short", "task.validation=W/tables/long.parquet"],
        "its 16 positions",
    ),
    ("an unknown type", ["task.model=W/models/oddtype"], "brandnew"),
    ("a model of images", ["task.model=W/models/vision"], "task.model"),
    ("a torn config", ["task.model=W/models/tornconfig"], "cannot be loaded"),
    ("a config that is a list", ["task.model=W/models/listconfig"], "cannot be loaded"),
    ("no config", ["task.model=W/models/noconfig"], "config.json"),
    ("a file, not a folder", ["task.model=W/models/file"], "config.json"),
    ("no folder", ["task.model=W/models/none"], "config.json"),
    ("no name", ["task.model="], "config.json"),
]
TABLES = [
    *(
        (f"train: {name}", [f"task.data=W/tables/{path}"], part)
        for name, path, part in [
            ("lists", "lists.parquet", "expected strings"),
            ("structs", "structs.parquet", "expected strings"),
            ("numbers", "numbers.parquet", "strings"),
            ("bytes", "bytes.parquet", "strings"),
            ("not UTF-8", "notutf8.parquet", "UTF-8"),
            ("a null", "nullrow.parquet", "1 missing values"),
            ("nulls alone", "nulls.parquet", "60 missing values"),
            ("two columns of a name", "twice.parquet", "2 columns of that name"),
            ("no rows", "norows.parquet", "no rows"),
            ("no columns", "nocolumns.parquet", "column missing"),
            ("other names", "othernames.parquet", "column missing"),
            ("labels null", "nulllabel.parquet", "1 missing values"),
            ("labels text", "textlabel.parquet", "integers"),
            ("labels floats", "floatlabel.parquet", "integers"),
            ("labels bool", "boollabel.parquet", "integers"),
            ("labels decimals", "decimals.parquet", "integers"),
            ("labels lists", "listlabel.parquet", "integers"),
            ("labels huge", "hugelabel.parquet", "expected 0 to 1"),
            ("labels negative", "neglabel.parquet", "labels -1 (none) of column"),
            ("one row", "one.parquet", "sampling_prob of at most 1"),
            ("cut off", "torn.parquet", "cannot be read as Parquet"),
            ("damaged inside", "holed.parquet", "cannot be read as Parquet"),
            ("an empty file", "empty.parquet", "cannot be read as Parquet"),
            ("text", "csv.parquet", "cannot be read as Parquet"),
            ("no file", "none.parquet", "not found"),
            ("an empty folder", "nothing", "not found"),
            ("no match", "none-*.parquet", "not found"),
            ("files of two types", "mixed", "differ"),
            ("files of two splits", "splits", "splits/train-*.parquet"),
            ("folders of two splits", "nested", "several splits"),
        ]
    ),
    ("train: no path", ["task.data="], "no path"),
    ("train: no driver", ["task.data=nosuch://x/y"], "cannot be reached"),
    ("train: no server", ["task.data=http://127.0.0.1:9/x.parquet?a=*"], "data"),
    ("validation: no file", ["task.validation=W/tables/none.parquet"], "not found"),
    ("validation: a null", ["task.validation=W/tables/nullrow.parquet"], "1 missing values"),
    ("validation: no rows", ["task.validation=W/tables/norows.parquet"], "no rows"),
    (
        "validation: the training data",
        ["task.validation=W/tables/good.parquet"],
        "hold other records out",
    ),
]
CONFIGS = [
    *(
        (text, [text], part)
        for text, part in [
            ("method.rnk=8", "did you mean 'method.rank'"),
            ("method=grape", "a group is not a value"),
            ("method.rank", "key=value"),
            ("method.rank=eight", "a value of type int"),
            ("method.learning_rate=1e39", "at most 1e+36"),
            ("method.weight_decay=1e300", "times the learning rate"),
            ("performance.threads_per_worker=100000", "at most 1024"),
            ("task.classes=1000000000000", "at most 1000000"),
            ("method.rank=64", "method.rank"),
            ("method.name=grap", "did you mean 'grape'"),
            ("method.optimizer=adamw", "did you mean 'adam'"),
            ("method.routes=*:gramm", "did you mean 'gram'"),
            ("method.dense=encodr.*", "method.dense"),
            ("method.routes=encodr.*:gram", "method.routes"),
            ("privacy.epsilon=nan", "privacy.epsilon"),
            ("privacy.delta=0.1", "delta"),
            ("privacy.steps=0", "privacy.steps"),
            ("privacy.expected_batch_size=61", "61 of 60 records"),
            ("privacy.noise_multiplier=0.001", "noise_multiplier"),
            ("privacy.clip_norm=0", "clip_norm"),
            ("performance.num_workers=3:2", "MIN:MAX"),
            ("performance.sharded=true", "0 workers"),
            ("performance.precision=fp16", "performance.precision"),
            ("method.name=none", "--not-private"),
            ("task.classes=1", "task.classes"),
            ("task.max_tokens=0", "task.max_tokens"),
            ("task.text_column=txt", "did you mean 'text'"),
            ("seed=x", "a value of type int"),
        ]
    ),
    pytest.param(
        "a GPU",
        ["performance.use_gpu=true"],
        "no GPU",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
    ),
]
GENERATION = [
    ("no tokenizer, OPT", ["task.model=W/models/notok-opt"], "has no tokenizer"),
    ("no tokenizer, Qwen2", ["task.model=W/models/notok-qwen2"], "has no tokenizer"),
    ("a head missing", ["task.model=W/models/good"], "missing"),
    ("bytes, and fewer rows", ["task.tokenizer=bytes"], "'95 rows'"),
    ("another tokenizer, not there", ["task.tokenizer=W/models/file"], "task.tokenizer"),
    ("no prompts", ["task.prompt_column=prompt"], "column missing"),
    ("long prompts", ["task.prompt_column=text", "task.max_tokens=3"], "a prompt of"),
]
WORDS = [
    *(
        (f"train {name}", ["train", name], part)
        for name, part in [
            ("pipelines.sst", "did you mean 'pipelines.sst2'"),
            ("nosuch", "not found"),
            ("W/code/nothin.py", "did you mean 'W/code/nothing.py'"),
            ("W/code", "ends in .py"),
            ("W/code/notes.txt", "ends in .py"),
            ("W/code/syntax.py", "SyntaxError"),
            ("W/code/raises.py", "ZeroDivisionError"),
            ("W/code/exits.py", "SystemError"),
            ("W/code/needs.py", "'nosuchlibrary'"),
            ("W/code/nothing.py", "no such function"),
            ("W/code/named.py", "confg"),
            ("W/code/fails.py", "KeyError"),
            ("W/code/wants.py:config", "TypeError"),
            ("W/code/other.py", "returns a grape_ray.Config"),
            ("W/code/json.py", "the name of another module"),
            ("W/code/taskless.py", "NoneType without load, build_model"),
            ("W/code/loads.py", "task.load returns, got 'tuple'"),
            ("pipelines..sst2", "pipeline"),
            (".", "pipeline"),
            (":sst2", "pipeline"),
        ]
    ),
    ("resume: no run", ["resume", "W/places/none"], "no run there"),
    ("resume: a torn description", ["resume", "W/places/torn"], "damaged"),
    ("resume: a description that is a list", ["resume", "W/places/list"], "damaged"),
    ("resume: fields missing", ["resume", "W/places/less"], "damaged"),
    ("resume: a task that is none", ["resume", "W/places/untasked"], "a task without its class"),
    ("resume: settings that are none", ["resume", "W/places/unset"], "privacy is a list"),
    ("resume: another's module", ["resume", "W/places/stranger"], "--trust-module strange_task"),
    ("resume: a path in place of a module", ["resume", "W/places/path"], "you have not named"),
    ("evaluate: no run", ["evaluate", "W/places/none"], "no run there"),
    ("evaluate: a torn description", ["evaluate", "W/places/torn"], "damaged"),
    ("export: no run", ["export", "W/places/none", "W/out"], "no run there"),
    ("export: taken", ["export", "W/places/torn", "W/models/good"], "taken"),
    ("report: no sweep", ["report", "W/places/none", "--out", "W/out.html"], "there is no sweep"),
    ("report: a torn description", ["report", "W/places/torn", "--out", "W/out.html"], "damaged"),
    ("ledger show: none", ["ledger", "show", "W/places/none"], "no ledger"),
    ("ledger show: a torn entry", ["ledger", "show", "W/places/ledger"], "cannot be used"),
    (
        "ledger extend: no ledger",
        ["ledger", "extend", "W/places/none", "--epsilon", "3", "--reason", "x"],
        "no ledger",
    ),
    ("check: no such thing", ["check", "W/models/none"], "neither a pipeline nor a model"),
    ("check: a torn model", ["check", "W/models/truncated"], "neither a pipeline nor a model"),
    (
        "account: delta",
        ["account", "--delta", "2", "--sampling-prob", "0.1", "--epsilon", "1", "--steps", "5"],
        "delta",
    ),
    (
        "account: a chance of 2",
        ["account", "--delta", "1e-5", "--sampling-prob", "2", "--epsilon", "1", "--steps", "5"],
        "sampling_prob",
    ),
    ("tune: no space", ["tune", "W/code/nothing.py"], "has no function space()"),
    ("tune: a space that fails", ["tune", "W/code/space_fails.py"], "KeyError"),
    ("tune: a field with a slip", ["tune", "W/code/space_slips.py"], "no field"),
    ("resume: no name", ["resume", ""], "empty"),
    ("resume: a file", ["resume", "W/models/file"], "W/models/file"),
    ("ledger verify: no name", ["ledger", "verify", ""], "empty"),
]
PLACES = [
    ("storage in a file", ["--storage", "W/models/file"], "W/models/file"),
    ("storage below a file", ["--storage", "W/models/file/runs"], "W/models/file"),
    ("storage that is no place", ["--storage", "/proc/nope"], "/proc/nope"),
    ("storage without a driver", ["--storage", "nosuch://x"], "nosuch://x"),
    ("storage without a name", ["--storage", ""], "empty"),
    ("storage behind a cache", ["--storage", "simplecache::s3://x/y"], "chain of drivers"),
    ("a ledger in a file", ["--ledger", "W/models/file"], "W/models/file"),
    ("a torn ledger", ["--ledger", "W/places/ledger"], "cannot be used"),
    ("the ledger of other data", ["--ledger", "W/places/other"], "another dataset_id"),
    ("a short key", ["--key-file", "W/places/short.key"], "5 bytes"),
    ("a key that all may read", ["--key-file", "W/places/open.key"], "chmod 600"),
    ("a key that is a folder", ["--key-file", "W/places"], "master key"),
    (
        "a key among the runs",
        ["--key-file", "W/storage/key", "--storage", "W/storage"],
        "the master key lies inside",
    ),
    ("a name with a slash", ["--run", "a/b"], "letters, digits"),
    ("a budget of nothing", ["--ledger-epsilon", "0"], "--ledger-epsilon"),
    ("a budget below the run's", ["--ledger-epsilon", "1"], "epsilon"),
    ("workers that are none", ["--workers", "many"], "performance.num_workers"),
]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """All inputs, made once."""
    root = tmp_path_factory.mktemp("bad")
    make_models(root / "models")
    make_tables(root / "tables")
    make_pipelines(root / "code")
    places = root / "places"
    good = {"run": "x", "ledger": None, "study": "x", "privacy": {}, "method": {}, "seed": 0}
    described = {
        "torn": '{"run": "torn", "led',
        "list": "[]",
        "less": '{"run": "less"}',
        "untasked": json.dumps({**good, "task": {}}),
        "unset": json.dumps({**good, "task": {"class": "a:B", "fields": {}}, "privacy": []}),
        "stranger": json.dumps(
            {**good, "run": "stranger", "task": {"class": "strange_task:T", "fields": {}}}
        ),
        "path": json.dumps(
            {
                **good,
                "run": "path",
                "task": {"class": f"grape_ray.{root}/code/raises.py:T", "fields": {}},
            }
        ),
    }
    for name, text in described.items():
        (places / name).mkdir(parents=True)
        for file in ("run.json", "sweep.json"):
            (places / name / file).write_text(text)
    Ledger.open(places / "other", "0" * 32, 8.0, 1e-5)
    Ledger.open(places / "ledger", "0" * 32, 8.0, 1e-5)
    entry = places / "ledger" / "00000000.json"
    entry.write_bytes(entry.read_bytes()[:-9])
    for name, content, mode in (("short.key", b"short", 0o600), ("open.key", bytes(32), 0o644)):
        (places / name).write_bytes(content)
        (places / name).chmod(mode)
    return root


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without keys, ledgers or runs, in a folder of its own."""
    for name, folder in (("HOME", "home"), ("XDG_DATA_HOME", "share"), ("XDG_STATE_HOME", "state")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(*folders):
    """Everything that lies in some folders, and how long it has."""
    found = sorted(
        path
        for folder in folders
        for path in Path(folder).rglob("*")
        if "__pycache__" not in path.parts
    )
    return [
        (
            str(path),
            path.stat().st_mtime_ns if path.is_file() else 0,
            path.stat().st_size if path.is_file() else 0,
        )
        for path in found
    ]


def filled(words, world):
    return [word.replace("W/", f"{world}/") for word in words]


def training(world, assignments=(), pipeline="pipelines.sst2", model="good"):
    """The words that train on good inputs, but for what is assigned."""
    own = [
        f"task.model={world}/models/{model}",
        f"task.data={world}/tables/good.parquet",
        f"task.validation={world}/tables/validation.parquet",
    ]
    if pipeline == "pipelines.sst2":  # the models here have two layers, and some no pooler
        own += ["task.trainable=[]", "task.pooling=first", "method.rates=[]"]
    own += [
        "task.text_column=text",
        "privacy.expected_batch_size=30",
        "privacy.steps=2",
        "privacy.spare_steps=0",
        "method.rank=4",
    ]
    own += ["method.project_min_numel=512"]
    return [
        "train",
        pipeline,
        *(word for text in [*own, *filled(assignments, world)] for word in ("--set", text)),
    ]


def refused(words, world, home, part):
    """Calls the program in this process; one line, status 2, and all is as it was."""
    before = contents(world, home)
    result = CliRunner().invoke(main, filled(words, world))
    checked(result.exit_code, result.stderr, part.replace("W/", f"{world}/"))
    assert result.stdout == ""
    assert contents(world, home) == before


def checked(status, stderr, part):
    lines = [line for line in stderr.strip().splitlines() if not line.startswith("warning: ")]
    assert status == 2, stderr
    assert len(lines) == 1, stderr
    assert re.fullmatch(r"error: .+(, got .+)?, expected .+; .+", lines[0]), lines[0]
    assert part in lines[0], lines[0]
    assert "Traceback" not in stderr


def named(cases):
    """Cases as pytest has them, by name."""
    return [case if hasattr(case, "marks") else pytest.param(*case, id=case[0]) for case in cases]


@pytest.mark.parametrize(("name", "assignments", "part"), named([*MODELS, *TABLES, *CONFIGS]))
def test_models_tables_and_configs(world, home, name, assignments, part):
    refused(training(world, assignments), world, home, part)


@pytest.mark.parametrize(("name", "assignments", "part"), named(GENERATION))
def test_generation(world, home, name, assignments, part):
    own = [
        "task.prompt_column=",
        "performance.num_workers=0",
        "performance.use_gpu=false",
        "performance.sharded=false",
    ]
    own += ["performance.precision=fp32", "performance.recompute=false"]
    refused(training(world, [*own, *assignments], "pipelines.opt", "gpt2"), world, home, part)


@pytest.mark.parametrize(("name", "words", "part"), named(WORDS))
def test_words(world, home, name, words, part):
    refused(words, world, home, part)


@pytest.mark.parametrize(("name", "words", "part"), named(PLACES))
def test_places(world, home, name, words, part):
    refused([*training(world), *words], world, home, part)


def test_the_good_inputs_train(world, home):
    """What the matrix refuses differs from this in one thing."""
    result = CliRunner().invoke(main, training(world))
    assert result.exit_code == 0, result.output
    assert "epsilon 3" in result.stdout


def test_the_matrix_is_large():
    assert len(MODELS + TABLES + CONFIGS + GENERATION + WORDS + PLACES) >= 60


@pytest.mark.parametrize(
    ("words", "environment", "part"),  # a cluster of other tests may be connected in this process
    [
        (["tests.support.tiny:tiny", "--workers", "1"], {"RAY_ADDRESS": "nonsense"}, "RAY_ADDRESS"),
        (["tests.support.tiny:tiny", "--workers", "1000"], {}, "performance.num_workers"),
        (training("W", ["task.data=W/tables/hugelabel.parquet"])[1:], {}, "expected 0 to 1"),
        (["W/code/raises.py"], {}, "ZeroDivisionError"),
    ],
)
def test_in_processes_of_their_own(world, home, words, environment, part):
    before = contents(world, home)
    program = [
        sys.executable,
        "-c",
        "from grape_ray.cli.main import main; main()",
        "train",
        *filled(words, world),
    ]
    done = subprocess.run(
        program,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    checked(done.returncode, done.stderr, part)
    assert contents(world, home) == before


def test_a_pipeline_is_trained_and_resumed_by_the_path_of_its_file(tmp_path, home):
    """From another folder than the file's; its task's class is defined in it, and other modules lie
    beside it.
    """
    code = tmp_path / "project" / "package"
    code.mkdir(parents=True)
    (code / "__init__.py").write_text("")
    (code / "size.py").write_text("STEPS = 2\n")
    (code / "mine.py").write_text(
        "from dataclasses import dataclass, replace\nfrom tests.support.tiny import Tiny, tiny\n"
        "from package.size import STEPS\n\n@dataclass(frozen=True)\nclass Mine(Tiny):\n    pass\n\n"
        "def mine():\n    return replace(tiny(STEPS), task=Mine())\n"
    )
    program = [sys.executable, "-c", "from grape_ray.cli.main import main; main()"]
    for words in (
        ["train", "project/package/mine.py", "--run", "r"],
        ["resume", "runs/r", "--trust-module", str(code / "mine.py")],
    ):
        done = subprocess.run(
            [*program, *words], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
    described = json.loads((tmp_path / "runs" / "r" / "run.json").read_text())
    # no path: the description may be published
    assert described["task"]["class"] == "package.mine:Mine"
    words = ["resume", "runs/r"]
    refused(words, tmp_path / "project", home, "--trust-module package.mine")


SECRET = "row 17: a secret"
FAULTY = f"""
from dataclasses import dataclass, replace
from tests.support.tiny import Tiny, tiny

@dataclass(frozen=True)
class Outside(Tiny):
    def __getattribute__(self, key):
        if key == "name":
            raise KeyError("{SECRET}")
        return super().__getattribute__(key)

@dataclass(frozen=True)
class Inside(Tiny):
    def build_model(self, seed):
        raise KeyError("{SECRET}")

def outside():
    return replace(tiny(), task=Outside())

def public():
    return replace(tiny(), task=Inside())

def private():
    return replace(tiny(), task=Inside(public=False))
"""


@pytest.mark.parametrize(
    ("name", "status", "quoted", "kept"),
    [("outside", 1, False, True), ("public", 2, True, False), ("private", 2, False, False)],
)
def test_what_nobody_foresaw_is_one_line_and_its_traceback_is_kept_without_records(
    home, name, status, quoted, kept
):
    file_name = f"faulty_{name}.py"  # a module is imported once a process
    (home / file_name).write_text(FAULTY)
    result = CliRunner().invoke(main, ["train", f"{file_name}:{name}"])
    (line,) = result.stderr.splitlines()
    assert (result.exit_code, line.startswith("error: "), "KeyError" in line) == (
        status,
        True,
        True,
    )
    assert (SECRET in line) is quoted
    files = list((home / "state" / "grape-ray").glob("error-*.txt"))
    assert len(files) == kept
    for file in files:
        text = file.read_text()
        assert file.stat().st_mode & 0o777 == 0o600
        assert str(file) in line
        assert (SECRET in text) is quoted
        assert file_name in text
        assert "KeyError" in text
    shown = CliRunner().invoke(main, ["--debug", "train", f"{file_name}:{name}"])
    assert shown.exit_code == status
    assert "Traceback" in shown.stderr
    assert sorted(path.name for path in home.iterdir() if path.name != "__pycache__") == (
        [file_name, "state"] if kept else [file_name]
    )


@pytest.mark.slow
def test_no_process_that_refuses_a_table_aborts_at_its_end(world):
    """Arrow's threads must not hold what is Python's when the interpreter ends: 200 processes,
    right after reading.
    """
    code = (
        "import pathlib, sys, tempfile\nfrom grape_ray.data.columns import Table\n"
        "from grape_ray.data.sources import Source\nfrom grape_ray.data.tables import read_table\n"
        "from grape_ray.errors import DataError\nwith tempfile.TemporaryDirectory() as folder:\n"
        f"    place = {str(world / 'tables' / 'hugelabel.parquet')!r}\n"
        "    rows = read_table(Source(place), ['text', 'label'], pathlib.Path(folder))\n"
        "    try:\n        Table(rows, place).labels('label', '01')\n"
        "    except DataError:\n        sys.exit(2)\n"
    )

    def call(_):
        return subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, check=False, timeout=60
        ).returncode

    with ThreadPoolExecutor(4) as pool:
        assert Counter(pool.map(call, range(200))) == {2: 200}
