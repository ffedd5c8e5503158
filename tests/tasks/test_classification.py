"""Classification of texts from files as people have them: string labels, several labels a row,
pairs, held-out records, what is kept on the machine.
"""

import csv
import importlib
import json
import shutil
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from grape_ray.config.description import describe, rebuild_config
from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.data import cache
from grape_ray.errors import Caution, ConfigError, DataError
from grape_ray.ledger.registry import register
from grape_ray.ray_backend.train import train
from grape_ray.tasks.task import loaded, resolved
from grape_ray.tasks.text_classification import TextClassification
from grape_ray.training.export import export
from grape_ray.training.splits import check_splits
from tests.support.word_model import WORDS, save_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with random weights and a tokenizer of whole words, and tables of tickets."""
    root = tmp_path_factory.mktemp("tickets")
    save_encoder(root / "bert")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(200):
        topic = ["billing", "outage", "other"][number % 3]
        text = " ".join(rng.choice(WORDS, size=int(rng.integers(1, 9))))
        tags = [WORDS[number % 3], *([WORDS[5]] if number % 2 else [])]
        rows.append({"who": f"u{number // 8}", "body": text, "topic": topic, "tags": tags})
    with (root / "tickets.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["who", "body", "topic"], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    (root / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


ENCODES = """
import dataclasses
from grape_ray.data.arrays import Ragged, Records
from grape_ray.tasks.text_classification import TextClassification

@dataclasses.dataclass(frozen=True)
class Mine(TextClassification):
    def encode(self, table, facts):
        found = super().encode(table, facts)
        return Records({**found.columns, "input_ids": Ragged.of([[TOKEN]] * len(found))})
"""


def task(folder, name="tickets.csv", **fields):
    own = {"text_column": "body", "label_column": "topic", "max_tokens": 8, "held_out": 0.25}
    own |= {"held_out_public": True, "model": str(folder / "bert"), "data": str(folder / name)}
    return TextClassification(**{**own, **fields})


def config(task, **privacy):
    return Config(
        task=task,
        privacy=Privacy(**{"expected_batch_size": 16, "steps": 2, "delta": 1e-4, **privacy}),
        method=Method(rank=4, project_min_numel=256),
        performance=Performance(micro_batch_size=8),
    )


def test_a_csv_with_string_labels_trains_and_names_its_labels(folder, tmp_path):
    with pytest.warns(Caution, match=r"names of the 3 labels.*task\.labels"):
        result = train(
            config(task(folder)),
            run="t",
            storage=str(tmp_path / "runs"),
            key_path=str(tmp_path / "key"),
        )
    assert result.steps == 2
    assert set(result.metrics) == {"accuracy", "f1", "loss"}
    export(str(tmp_path / "runs" / "t"), tmp_path / "out")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert again.config.id2label == {0: "billing", 1: "other", 2: "outage"}


def test_a_resolved_task_needs_no_data_to_build_its_model(folder):
    one = task(folder)
    with pytest.warns(Caution):
        known = resolved(one, loaded(one))
    again = rebuild_config(json.loads(json.dumps(describe(config(known))))).task
    assert again == known
    gone = replace(again, data=str(folder / "gone.csv"))
    assert gone.build_model(0).config.id2label[2] == "outage"  # pyright: ignore


def test_names_that_are_declared_are_not_read_and_another_label_is_refused(folder):
    names = ("other", "outage", "billing")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Caution)
        one = resolved(task(folder, labels=names), loaded(task(folder, labels=names)))
    assert one.labels == names
    with pytest.raises(DataError, match=r"another label in rows 2, 5, .* and \d+ more'") as caught:
        task(folder, labels=names[1:]).load()
    assert "other'" not in str(caught.value)
    with pytest.raises(DataError, match=r"integers from 0 to 2.*task\.classes=0"):
        task(folder, classes=3).load()


def test_several_labels_a_row_and_pairs_of_texts(folder):
    one = task(folder, "tickets.jsonl", label_column="tags", multi_label=True, pair_column="topic")
    data = one.load()
    known = resolved(replace(one, public=True), data)
    assert known.labels == ("grape", "rain", "salt", "wine")
    assert set(data.train.array("labels").sum(1).tolist()) == {1.0, 2.0}
    model = known.build_model(0)
    batch = known.collate(data.train, np.arange(5))
    assert known.per_example_loss(model, batch).shape == (5,)
    assert 0 <= known.evaluate(model, data.validation)["accuracy"] <= 1
    said = known.predict(model, data.validation)
    assert all(set(row) <= set(known.labels) for row in said["label"])
    assert list(said["probabilities"][0]) == list(known.labels)


def test_class_weights_scale_an_examples_loss(folder):
    one = task(folder, labels=("billing", "outage", "other"))
    two = replace(one, class_weights=(1.0, 3.0, 0.0))
    data, model = one.load(), one.build_model(0)
    batch = one.collate(data.train, np.arange(9))
    factors = torch.tensor([1.0, 3.0, 0.0])[batch["labels"]]
    torch.testing.assert_close(
        two.per_example_loss(model, batch), factors * one.per_example_loss(model, batch)
    )


def test_what_is_held_out_depends_on_each_record_alone(folder, tmp_path):
    """One row more moves no other row from one side to the other."""
    whole = (folder / "tickets.csv").read_text()
    (tmp_path / "more.csv").write_text(whole + "u99,grape grape grape grape,other\n")
    less, more = task(folder).load(), task(folder, data=str(tmp_path / "more.csv")).load()
    hashes = [set(d.digests.rows.tolist()) for d in (less.train, less.validation)]
    others = [set(d.digests.rows.tolist()) for d in (more.train, more.validation)]
    assert all(a <= b for a, b in zip(hashes, others))
    assert sum(len(b - a) for a, b in zip(hashes, others)) == 1
    assert 20 < len(less.validation) < 80


@pytest.mark.filterwarnings("ignore")
def test_a_csv_trains_by_the_column_of_its_users_and_quotes_none(folder, tmp_path):
    own = config(task(folder), unit="who", expected_batch_size=8, examples_per_unit=3)
    result = train(own, run="r", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    assert (result.unit, result.examples_per_unit, result.steps) == ("who", 3, 2)
    kept = [file.read_bytes() for file in (tmp_path / "runs").rglob("*.json*")]
    assert kept
    assert not any(f'"u{number}"'.encode() in text for text in kept for number in range(25))


def test_units_are_held_out_whole(folder, tmp_path):
    units = task(folder).load(unit="who").units
    assert 10 < len(units) < 25
    assert set(units.sizes(np.arange(len(units))).tolist()) == {8}
    odd = ["a,b", '"quoted"', "two\nlines", " spaces ", "ünïcode", "0", "00", "None", "a\x00b"]
    rows = [
        [who, f"{word} {word}", "xy"[place % 2]] for who in odd for place, word in enumerate(WORDS)
    ]
    with (tmp_path / "odd.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["who", "body", "topic"], *rows])
    found = task(folder, data=str(tmp_path / "odd.csv")).load(unit="who")
    assert 10 * len(found.units) == len(found.train) == 90 - len(found.validation)
    (tmp_path / "gaps.csv").write_text("who,body,topic\na,wine,x\n,rain,y\n")
    with pytest.raises(DataError, match="1 empty values of column 'who' in row 1"):
        task(folder, data=str(tmp_path / "gaps.csv")).load(unit="who")


def test_private_held_out_records_are_not_spoken_of(folder, tmp_path):
    one = config(
        replace(task(folder, labels=("billing", "outage", "other")), held_out_public=False)
    )
    with pytest.warns(Caution, match="no metric of them is told"):
        result = train(one, run="t", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    assert result.metrics == {}


def test_records_are_encoded_once(folder, monkeypatch):
    asked = []
    encode = TextClassification.encode
    monkeypatch.setattr(
        TextClassification, "encode", lambda *args: asked.append(1) or encode(*args)
    )
    one = task(folder, max_tokens=7)
    first, again = one.load(), one.load()
    assert asked == [1]
    assert first.dataset_id == again.dataset_id == task(folder).load().dataset_id
    assert not first.train.sequences("input_ids").values.flags.owndata  # mapped, not copied
    assert cache.cache_folder().stat().st_mode & 0o777 == 0o700


def test_rows_that_lack_a_value_are_refused_or_left_out(folder, tmp_path):
    path = tmp_path / "gaps.csv"
    path.write_text((folder / "tickets.csv").read_text() + "u1,,billing\nu1, ,other\n")
    with pytest.raises(DataError, match=r"2 empty values of column 'body' in rows 200, 201.*drop"):
        task(folder, data=str(path)).load()
    kept = task(folder, data=str(path), drop_bad_rows=True).load()
    assert len(kept.train) + len(kept.validation) == 200


def test_private_validation_records_are_known_in_another_fraction_or_limit(folder, tmp_path):
    """Each would have a budget of its own for its scores, or exact metrics, otherwise."""
    held_out = [task(folder, held_out=f).load().validation_identity for f in (0.2, 0.4)]
    more = {"held_out": 0.0, "validation": str(folder / "tickets.jsonl")}
    limited = [task(folder, validation_limit=n, **more).load() for n in (50, 100)]
    for one, other in (held_out, [data.validation_identity for data in limited]):
        assert one[0] != other[0]
        assert set(one) & set(other)
    register(held_out[0], str(tmp_path / "scores"), "some ledger")
    with pytest.raises(DataError, match="known as private"):
        check_splits(task(folder, held_out=0.4).load(), exact_metrics=True, protects=True)


def test_what_is_kept_is_of_a_tasks_own_code(folder, tmp_path, monkeypatch):
    """An `encode` that was edited, or another of the same name, encodes anew."""
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for module, token in [("one_task", 2), ("two_task", 3), ("one_task", 4)]:
        (tmp_path / f"{module}.py").write_text(ENCODES.replace("TOKEN", str(token)))
        sys.modules.pop(module, None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        importlib.invalidate_caches()
        mine = importlib.import_module(module).Mine(**vars(task(folder)))
        found.append(int(mine.load().train.sequences("input_ids").values[0]))
    assert found == [2, 3, 4]


def test_rows_that_are_left_out_make_no_other_dataset(folder, tmp_path):
    """A row without a unit is left out where there are units alone, and the budget is the same."""
    path = tmp_path / "gaps.csv"
    path.write_text((folder / "tickets.csv").read_text() + ",no user,billing\n")
    some = task(folder, data=str(path), drop_bad_rows=True)
    by_record, by_user = some.load(), some.load(unit="who")
    assert len(by_record.train) + len(by_record.validation) == 201
    assert len(by_user.train) + len(by_user.validation) == 200
    assert by_record.dataset_id == by_user.dataset_id
    assert by_record.columns == by_user.columns != ()


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"held_out": 1.5}, "task.held_out"),
        ({"labels": ("a",)}, "task.labels"),
        ({"labels": ("a", "a")}, "task.labels"),
        ({"classes": 1}, "task.classes"),
        ({"class_weights": (1.0, -1.0)}, "task.class_weights"),
        ({"validation": "x.csv"}, "one of them"),
        ({"held_out": 0.0}, "task.held_out=0.1"),
        ({"labels": ("a", "b"), "class_weights": (1.0,)}, "task.class_weights"),
    ],
)
def test_fields_that_cannot_be_are_refused(folder, fields, part):
    with pytest.raises(ConfigError, match=part):
        task(folder, **fields).load()
