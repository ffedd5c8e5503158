"""Frozen parts of models: a record goes through them once, and what is trained is what would be
trained otherwise.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import transformers
from transformers.models.bert.modeling_bert import BertLayer

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
    """A tiny BERT, one of two layers, a tiny RoBERTa, and texts with a label and a number."""
    root, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    save_encoder(root / "bert")
    save_encoder(root / "deep", layers=2)
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
        (TextClassification, "fp32", {"model": "roberta"}),
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

    monkeypatch.setattr(TextPairTask, "logits", counted)
    learns_the_same(config(task(folder, kind, **fields), precision), tmp_path, monkeypatch, read)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_blocks_read_a_record_once_and_the_same_is_learned(
    folder, tmp_path, monkeypatch, precision
):
    read, forward = [], BertLayer.forward

    def counted(self, hidden, *args, **options):
        if self.attention.self.layer_idx == 0:
            read.append(len(hidden))
        return forward(self, hidden, *args, **options)

    monkeypatch.setattr(BertLayer, "forward", counted)
    one = task(folder, model="deep", trainable=("upper-half", "classifier.*"))
    grape = Method(name="grape", rank=4, learning_rate=0.01, project_min_numel=64)
    own = replace(config(one, precision), method=grape)
    learns_the_same(own, tmp_path, monkeypatch, read)


def learns_the_same(config, folder, monkeypatch, read):
    """Trains with and without features that are kept, and compares; `read` grows by the records
    that go through what is frozen.
    """

    def trained(name):
        place = {"storage": str(folder / "runs"), "key_path": str(folder / "key")}
        plan = planned(config, run=name, **place)
        read.clear()
        result = execute(plan, Comms.local(), RunCallbacks(begin_attempt=same_streams))
        found = checkpoint.latest(plan.folder())
        assert found is not None
        return found.model, result.metrics, sum(read)

    ours, metrics, few = trained("features")
    monkeypatch.setattr(runs, "on_features", lambda task, *_, **__: task)
    theirs, wanted, many = trained("records")
    assert few <= RECORDS + 2  # the two that it is tried on
    assert many > 2 * RECORDS
    assert ours.keys() == theirs.keys()
    exact = config.performance.precision == "fp32"
    for name, tensor in theirs.items():
        tolerance = 1e-5 if exact else 2e-2
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=tolerance, msg=name)
    told = "loss" if isinstance(config.task, TextClassification) else "mse"
    assert metrics[told] == pytest.approx(wanted[told], rel=1e-4 if exact else 0.02)


@dataclass(frozen=True)
class Mine(TextClassification):
    """A class of a user's own, which may look at anything in a batch."""


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Mine, {}),
        (TextClassification, {"trainable": ()}),
        (TextClassification, {"trainable": ("*bias",)}),
        (TextClassification, {"trainable": ("upper-half", "classifier.*")}),  # its only layer
        (TextClassification, {"model": "deep", "trainable": ("*embeddings*", "*layer.1.*")}),
        (Mine, {"model": "deep", "trainable": ("upper-half",)}),
        (TextClassification, {"trainable": (), "lora": Lora(rank=2)}),
        (TextClassification, {"dropout": True}),
        # whose head is given every token's vector
        (TextClassification, {"model": "roberta", "pooling": "first"}),
    ],
)
def test_anything_but_a_head_on_a_vector_or_upper_blocks_stays_as_it_is(folder, kind, fields):
    one = task(folder, kind, **fields)
    data = loaded(one, "")
    one = resolved(one, data)
    assert on_features(one, one.build_model(0), data, half=False) is one


def test_a_head_whose_weight_is_used_elsewhere_stays_as_it_is(folder):
    one = task(folder)
    data = loaded(one, "")
    one = resolved(one, data)
    model = one.build_model(0)
    assert on_features(one, model, data, half=False) is not one
    pooler, classifier = model.get_submodule("bert.pooler"), model.get_submodule("classifier")
    pooler.register_parameter("extra", classifier.get_parameter("weight"))
    assert on_features(one, model, data, half=False) is one
