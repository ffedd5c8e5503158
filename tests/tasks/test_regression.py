"""Numbers of texts."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers

from grape_ray.data.arrays import Records
from grape_ray.data.columns import Table
from grape_ray.errors import DataError
from grape_ray.tasks.regression import Regression
from tests.support.tasks import TOKENS, WORDS, save_tokenizer, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT, and pairs of texts with the share of words that they have in common."""
    root, rng = tmp_path_factory.mktemp("numbers"), np.random.default_rng(0)
    config = transformers.BertConfig(
        vocab_size=TOKENS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(root / "bert")
    save_tokenizer(root / "bert")
    rows = []
    for _ in range(90):
        one, other = (rng.choice(WORDS, size=int(rng.integers(1, 7))) for _ in range(2))
        share = len(set(one) & set(other)) / len(set(one) | set(other))
        rows.append({"text": " ".join(one), "other": " ".join(other), "score": share})
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def task(folder, **fields):
    own = {"model": str(folder / "bert"), "data": str(folder / "pairs.jsonl"), "held_out": 0.3}
    return Regression(**{**own, "public": True, "pair_column": "other", **fields})


def test_trains_is_exported_and_predicts(folder, tmp_path):
    one = task(folder)
    result, out = trained(one, tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert (again.config.num_labels, again.config.problem_type) == (1, "regression")
    records = one.load().validation
    said = np.array(one.predict(again, records)["number"])
    truth = records.array("labels")
    wanted = {
        "mse": ((said - truth) ** 2).mean(),
        "mae": abs(said - truth).mean(),
        "pearson": np.corrcoef(said, truth)[0, 1],
    }
    found = {name: value for name, value in result.metrics.items() if name in wanted}
    assert found == pytest.approx(wanted, rel=1e-4)
    assert -1 <= result.metrics["spearman"] <= 1
    table = Table(pa.table({"text": ["wine rain"], "other": ["wine"]}), "here")
    ids = again(**one.load_tokenizer()("wine rain", "wine", return_tensors="pt")).logits
    assert one.predict(again, Records(one.inputs(table)))["number"] == pytest.approx([ids.item()])


def test_the_loss_is_the_squared_error(folder):
    one = task(folder)
    records, net = one.load().train, one.build_model(0)
    batch = one.collate(records, np.arange(6))
    wanted = (net(**batch).logits.squeeze(1) - batch["labels"]) ** 2
    torch.testing.assert_close(one.per_example_loss(net, batch), wanted)


def test_numbers_that_are_none_are_refused(folder, tmp_path):
    path = tmp_path / "bad.jsonl"
    rows = [{"text": "wine", "other": "rain", "score": value} for value in (0.5, None, 1.5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="1 missing values of column 'score' in row 1"):
        task(folder, data=str(path)).load()
    path.write_text(path.read_text().replace("null", "Infinity"))
    with pytest.raises(DataError, match="'score' that are not finite in row 1"):
        task(folder, data=str(path)).load()
    with pytest.raises(DataError, match=r"column 'text'.*expected numbers"):
        task(folder, number_column="text").load()
    net = task(folder).build_model(0)
    alone = task(folder).load().validation.take(np.array([0]))
    assert np.isnan(task(folder).evaluate(net, alone)["pearson"])
