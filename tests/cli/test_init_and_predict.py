"""From a file of records to answers: init, train, export, predict."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from grape_ray.cli.main import main
from grape_ray.config.pipelines import pipeline
from grape_ray.tasks.text_generation import TextGeneration
from grape_ray.training.init import Found, run_file
from grape_ray.training.predict import describe_exported
from pipelines.sst2 import sst2
from tests.support.word_model import WORDS, save_encoder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny encoder with random weights and a tokenizer of whole words."""
    return save_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def call(*words):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def tickets(path, rows=320):
    rng = np.random.default_rng(0)
    table = [
        {
            "id": number,
            "user_id": f"u{number // 8}",
            "body": " ".join(rng.choice(WORDS[5 * (number % 2) :][:5], size=6)),
            "topic": ["billing", "outage"][number % 2],
        }
        for number in range(rows)
    ]
    pd.DataFrame(table).to_csv(path, index=False)
    return table


def test_from_a_csv_to_answers(here, bert):
    table = tickets(here / "tickets.csv")
    done = call("init", "text-classification", "--data", "tickets.csv", "--model", bert)
    assert done.exit_code == 0, done.output
    said = yaml.safe_load((here / "run.yaml").read_text())
    assert said["task"] | {"held_out": 0, "held_out_public": 0, "model": ""} == {
        "kind": "text-classification", "model": "", "data": "tickets.csv", "text_column": "body",
        "label_column": "topic", "labels": ["billing", "outage"], "held_out": 0,
        "held_out_public": 0,
    }  # fmt: skip
    config = pipeline("run.yaml")
    assert (config.privacy.unit, config.privacy.delta) == ("user_id", 0.01)
    assert config.privacy.delta < 1 / 40

    own = ["method.rank=4", "privacy.steps=3", "privacy.epsilon=8", "task.held_out_public=true"]
    words = [word for assignment in own for word in ("--set", assignment)]
    done = call("train", "run.yaml", *words, "--run", "t", "--key-file", here / "home" / "key")
    assert done.exit_code == 0, done.output
    assert "user_id" in done.output
    assert call("export", "runs/t", "model").exit_code == 0
    card = (here / "model" / "README.md").read_text()
    assert "epsilon 8 at delta 0.01" in card
    assert "| privacy unit | user_id |" in card
    assert str(bert) not in card

    pd.DataFrame(table)[["body"]].to_csv("new.csv", index=False)
    assert "320 answers" in call("predict", "model", "new.csv").output
    done = call("predict", "runs/t", "new.csv", "--out", "answers.parquet")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (here / "predictions.jsonl").read_text().splitlines()]
    answers = pq.read_table("answers.parquet").to_pylist()
    assert [line["label"] for line in lines] == [answer["label"] for answer in answers]
    assert all(sum(line["probabilities"].values()) == pytest.approx(1) for line in lines)


def test_many_records_of_a_sentence_encoder_are_worth_its_upper_half(here):
    fields = {"text_column": "text", "label_column": "label"}
    for units, trained in ((10_000, ("classifier.*",)), (67_349, ("upper-half", "classifier.*"))):
        found = Found(units, fields, "", units, ("a", "b"))
        said = run_file("text-classification", "d.csv", "all-MiniLM-L6-v2", found, 3.0)
        (here / "run.yaml").write_text(said)
        config = pipeline("run.yaml")
        assert config.task.trainable == trained
    assert config.method == replace(sst2().method, warmup_steps=5)
    assert config.privacy.expected_batch_size == sst2().privacy.expected_batch_size
    assert config.privacy.clip_norm == sst2().privacy.clip_norm


def test_an_exported_folder_does_not_say_where_things_lay():
    task = TextGeneration("/home/ann/model", "/home/ann/chats", tokenizer="/home/ann/tokenizer")
    assert "ann" not in describe_exported(task)
    assert '"tokenizer": "bytes"' in describe_exported(replace(task, tokenizer="bytes"))


@pytest.mark.ray
@pytest.mark.slow
def test_names_below_this_folder_are_found_by_workers(here, bert):
    tickets(here / "tickets.csv", 80)
    shutil.copytree(bert, here / "model")
    assert (
        call("init", "text-classification", "--data", "tickets.csv", "--model", "model").exit_code
        == 0
    )
    own = ["method.rank=4", "privacy.steps=1", "privacy.expected_batch_size=4"]
    words = [word for assignment in own for word in ("--set", assignment)]
    done = call("train", "run.yaml", *words, "--workers", "2", "--key-file", here / "home" / "key")
    assert done.exit_code == 0, done.output
    assert "2 workers" in done.output


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["init", "text-clasification", "--data", "t.csv"], ["did you mean 'text-classification'"]),
        (["init", "text-classification", "--data", "none.csv"], ["data not found", "none.csv"]),
        (["init", "text-classification", "--data", "n.csv"], ["task.text_column", "a (int64)"]),
        (["init", "text-classification", "--data", "t.csv", "--epsilon", "0"], ["--epsilon"]),
        (["init", "text-classification", "--data", "t.csv", "--out", "n.csv"], ["a new file"]),
        (["predict", "nowhere", "t.csv"], ["no run there"]),
        (["predict", "nowhere", "t.csv", "--out", "x.txt"], [".jsonl or .parquet"]),
        (["fields", "pipelines.digits"], ["did you mean 'pipelines.digits_vit'"]),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(here, words, parts):
    tickets(here / "t.csv", 40)
    (here / "n.csv").write_text("a,b\n1,2\n3,4\n")
    before = sorted(here.iterdir())
    done = call(*words)
    assert done.exit_code == 2
    assert all(part in done.output for part in parts), done.output
    assert sorted(here.iterdir()) == before
