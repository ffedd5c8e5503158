"""Heads on frozen models: a record goes through the frozen part once, and what is trained is what
would be trained otherwise.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers

from grape_ray import checkpoint
from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.distributed.comms import Comms
from grape_ray.models.adapters import Lora
from grape_ray.tasks.regression import Regression
from grape_ray.tasks.task import loaded, resolved
from grape_ray.tasks.text_classification import TextClassification
from grape_ray.tasks.text_pairs import TextPairTask
from grape_ray.training import run as runs
from grape_ray.training.callbacks import RunCallbacks
from grape_ray.training.frozen_features import on_features
from grape_ray.training.run import execute
from tests.support.plans import planned, same_streams
from tests.support.word_model import WORDS, save_encoder, save_tokenizer

RECORDS, STEPS = 120, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT, a tiny RoBERTa, and texts with a label and a number."""
    root, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    save_encoder(root / "bert")
    sizes = {"vocab_size": save_tokenizer(root / "roberta"), "max_position_embeddings": 40}
    config = transformers.RobertaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        pad_token_id=0, **sizes,
    )  # fmt: skip
    transformers.RobertaModel(config).save_pretrained(root / "roberta")
    rows = ["text,label,score"]
    for number in range(RECORDS):
        words = rng.choice(WORDS[5 * (number % 2) :][:5], size=int(rng.integers(2, 9)))
        rows.append(f"{' '.join(words)},{'ab'[number % 2]},{number % 2}.5")
    (root / "texts.csv").write_text("\n".join(rows) + "\n")
    return root


def task(folder, kind=TextClassification, model="bert", **fields):
    own = {"text_column": "text", "max_tokens": 8, "held_out": 0.25, "held_out_public": True}
    own |= {"model": str(folder / model), "data": str(folder / "texts.csv"), "public": True}
    return kind(**{"trainable": ("classifier.*",), "pooling": "mean", **own, **fields})


def config(task, precision):
    return Config(
        task=task,
        privacy=Privacy(expected_batch_size=30, steps=STEPS, delta=1e-4, clip_norm=1.0),
        method=Method(name="bookkeeping", learning_rate=0.03),
        performance=Performance(micro_batch_size=8, precision=precision, eval_every=6),
    )


@pytest.mark.parametrize(
    ("kind", "precision", "fields"),
    [
        (TextClassification, "fp32", {}),
        (TextClassification, "bf16", {}),
        (Regression, "fp32", {"number_column": "score"}),
    ],
)
def test_a_record_is_read_once_and_the_same_is_learned(
    folder, tmp_path, monkeypatch, kind, precision, fields
):
    read, logits = [], TextPairTask.logits

    def counted(self, model, batch):
        read.append(len(batch["input_ids"]))
        return logits(self, model, batch)

    def trained(name):
        place = {"storage": str(tmp_path / "runs"), "key_path": str(tmp_path / "key")}
        plan = planned(config(task(folder, kind, **fields), precision), run=name, **place)
        read.clear()
        result = execute(plan, Comms.local(), RunCallbacks(begin_attempt=same_streams))
        found = checkpoint.latest(plan.folder())
        assert found is not None
        return found.model, result.metrics, sum(read)

    monkeypatch.setattr(TextPairTask, "logits", counted)
    ours, metrics, few = trained("features")
    monkeypatch.setattr(runs, "on_features", lambda task, model, data: task)
    theirs, wanted, many = trained("records")
    assert few <= RECORDS + 2  # the two that the head is tried on
    assert many > 2 * RECORDS
    assert ours.keys() == theirs.keys()
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=tolerance, msg=name)
    told = "loss" if kind is TextClassification else "mse"
    assert metrics[told] == pytest.approx(wanted[told], rel=1e-4 if precision == "fp32" else 0.02)


@dataclass(frozen=True)
class Mine(TextClassification):
    """A class of a user's own, which may look at anything in a batch."""


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Mine, {}),
        (TextClassification, {"trainable": ()}),
        (TextClassification, {"trainable": ("*bias",)}),
        (TextClassification, {"trainable": ("upper-half", "classifier.*")}),
        (TextClassification, {"trainable": (), "lora": Lora(rank=2)}),
        (TextClassification, {"dropout": True}),
        (TextClassification, {"model": "roberta"}),  # whose head reads every token's vector
    ],
)
def test_anything_but_a_head_on_a_vector_stays_as_it_is(folder, kind, fields):
    one = task(folder, kind, **fields)
    data = loaded(one, "")
    one = resolved(one, data)
    assert on_features(one, one.build_model(0), data) is one


def test_a_head_whose_weight_is_used_elsewhere_stays_as_it_is(folder):
    one = task(folder)
    data = loaded(one, "")
    one = resolved(one, data)
    model = one.build_model(0)
    assert on_features(one, model, data) is not one
    pooler, classifier = model.get_submodule("bert.pooler"), model.get_submodule("classifier")
    pooler.register_parameter("extra", classifier.get_parameter("weight"))
    assert on_features(one, model, data) is one
