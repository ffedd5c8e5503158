"""Pairs of answers: the loss of DPO, its reference, and what a pair's gradient is."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers

from grape_ray.data.arrays import Records
from grape_ray.data.columns import Table
from grape_ray.engines import make_engine
from grape_ray.errors import ConfigError, DataError
from grape_ray.models.adapters import Lora
from grape_ray.tasks.preference import Preference
from tests.support.oracle import expected, worst
from tests.support.tasks import trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama that reads bytes, and pairs of answers of different lengths."""
    root, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 259}
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **ids
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(root / "llama")
    rows = []
    for number in range(70):
        one, other = ("ab"[place] * int(rng.integers(1, 9)) for place in range(2))
        rows.append({"prompt": f"q{number}", "chosen": one, "rejected": other})
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def task(folder, **fields):
    own = {"model": str(folder / "llama"), "data": str(folder / "pairs.jsonl"), "held_out": 0.3}
    own |= {"public": True, "tokenizer": "bytes", "max_tokens": 16, "max_new_tokens": 4}
    return Preference(**{**own, **fields})


@pytest.mark.parametrize("fields", [{}, {"lora": Lora(rank=2)}])
def test_trains_is_exported_and_generates(folder, tmp_path, fields):
    one = task(folder, **fields)
    result, out = trained(one, tmp_path)
    assert set(result.metrics) == {"accuracy", "margin", "loss"}
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    found = one.evaluate(again, one.load().validation)
    assert found == pytest.approx(dict(result.metrics), rel=1e-3, abs=1e-5)
    table = Table(pa.table({"prompt": ["q1", "q"]}), "here")
    texts = one.predict(again, Records(one.inputs(table)))["text"]
    written = again.generate(input_ids=torch.tensor([[1, 116, 52]]), max_new_tokens=4)
    assert texts[0] == one.texts_of(written[:, 3:].tolist())[0]


def test_the_loss_is_that_of_the_definition(folder):
    one = task(folder, beta=0.7)
    records, start = one.load().train, one.build_model(0)
    batch = one.collate(records, np.arange(6))
    torch.testing.assert_close(
        one.per_example_loss(start, batch), torch.full((6,), np.log(2.0)), rtol=0, atol=2e-3
    )
    net = one.build_model(0)
    with torch.no_grad():
        for param in net.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    losses = one.per_example_loss(net, batch)

    def answer(model, row, kind):
        ids = torch.from_numpy(records.sequences(kind)[row].astype(np.int64))
        start = int(records.array("prompt")[row])
        chances = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        return sum(chances[t - 1, ids[t]] for t in range(start, len(ids)))

    for row in range(6):
        rose = [answer(net, row, k) - answer(start, row, k) for k in ("chosen", "rejected")]
        wanted = -torch.nn.functional.logsigmoid(0.7 * (rose[0] - rose[1]))
        torch.testing.assert_close(losses[row], wanted, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("method", ["bookkeeping", "ghost", "grape"])
def test_both_answers_are_one_example(folder, method):
    one = task(folder)
    net = one.build_model(0).double()
    batch = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in one.collate(one.load().train, np.arange(5)).items()
    }
    engine = make_engine(net, method, 0.01, rank=4, project_min_numel=100)
    summed = engine.clipped_sum(one.per_example_loss, batch)
    assert worst(summed.tensors, expected(engine, one.per_example_loss, batch, 5)) < 1e-6


def test_what_is_held_out_and_known_again_does_not_depend_on_the_references_last_bits(
    folder, monkeypatch
):
    first = task(folder).load()
    reference = Preference._reference
    monkeypatch.setattr(
        Preference, "_reference", lambda self, records: reference(self, records) + np.float32(1e-4)
    )
    other = replace(task(folder), limit=69).load()  # another prepared set
    kept = {row.tobytes() for row in (first.train.sequences("chosen")[i] for i in range(5))}
    assert kept <= {other.train.sequences("chosen")[i].tobytes() for i in range(len(other.train))}
    assert abs(len(first.train) - len(other.train)) <= 1
    assert first.dataset_id == other.dataset_id


def test_what_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"task\.beta"):
        task(folder, beta=0.0)
    with pytest.raises(DataError, match=r"no room for an answer in rows 10, 11, .*max_tokens = 4"):
        task(folder, max_tokens=4).load()
    path = tmp_path / "bad.csv"
    path.write_text("prompt,chosen,rejected\nq,a,b\nq,,b\n")
    with pytest.raises(DataError, match="1 empty values of column 'chosen' in row 1"):
        task(folder, data=str(path)).load()
