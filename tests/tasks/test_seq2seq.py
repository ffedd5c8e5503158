"""Encoder-decoders on sources and targets."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers

from grape_ray.data.arrays import Records
from grape_ray.data.columns import Table
from grape_ray.errors import ConfigError, DataError
from grape_ray.models import extras
from grape_ray.models.adapters import Lora
from grape_ray.tasks.seq2seq import Seq2Seq
from grape_ray.tasks.text_metrics import generation_metrics
from tests.support.tasks import TOKENS, WORDS, save_tokenizer, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models with random weights, and sources with one target or two."""
    root, rng = tmp_path_factory.mktemp("seq2seq"), np.random.default_rng(0)
    torch.manual_seed(0)
    ids = {"vocab_size": TOKENS, "pad_token_id": 0, "eos_token_id": 3}
    t5 = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,  # pyright: ignore[reportCallIssue]
        **ids,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(t5).save_pretrained(root / "t5")
    bart = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, bos_token_id=3,
        max_position_embeddings=32, decoder_start_token_id=3, forced_eos_token_id=3, **ids,
    )  # fmt: skip
    transformers.BartForConditionalGeneration(bart).save_pretrained(root / "bart")
    for name in ("t5", "bart"):
        save_tokenizer(root / name, end=True)
    rows = []
    for number in range(80):
        words = rng.choice(WORDS, size=int(rng.integers(1, 7))).tolist()
        rows.append({"source": " ".join(words), "target": " ".join(reversed(words))})
        if number % 4 == 0:
            rows.append({"source": " ".join(words), "target": " ".join(words)})
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def task(folder, model="t5", **fields):
    own = {"held_out": 0.3, "public": True, "max_new_tokens": 6, "evaluate_generations": 4}
    own |= {"model": str(folder / model), "data": str(folder / "pairs.jsonl")}
    return Seq2Seq(**{**own, **fields})


@pytest.mark.parametrize(
    ("model", "fields"), [("bart", {}), ("t5", {"lora": Lora(rank=2)}), ("t5", {"loss": "sum"})]
)
def test_trains_is_exported_and_predicts(folder, tmp_path, model, fields):
    one = task(folder, model, **fields)
    result, out = trained(one, tmp_path)
    assert set(result.metrics) == {"loss", "perplexity", "bleu", "rouge_l"}
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    table = Table(pa.table({"source": ["grape wine", "rain", "fish milk"]}), "here")
    texts = one.predict(again, Records(one.inputs(table)))["text"]
    ids = transformers.AutoTokenizer.from_pretrained(out)("grape wine", return_tensors="pt")
    written = again.generate(
        input_ids=ids["input_ids"], max_new_tokens=6, do_sample=False, num_beams=1
    )
    assert len(texts) == 3
    assert texts[0] == one.load_tokenizer().decode(written[0], skip_special_tokens=True)


def test_the_loss_is_that_of_transformers_and_the_targets_alone(folder):
    one = task(folder)
    records, net = one.load().train, one.build_model(0)
    losses = one.per_example_loss(net, one.collate(records, np.arange(6)))
    sums = replace(one, loss="sum").per_example_loss(net, one.collate(records, np.arange(6)))
    for row in range(6):
        alone = one.collate(records, np.array([row]))
        wanted = net(**alone).loss
        torch.testing.assert_close(losses[row], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sums[row], wanted * alone["labels"].shape[1], rtol=1e-4, atol=0)
    assert all(records.sequences("labels")[row][-1] == 3 for row in range(6))


def test_several_targets_of_a_source_are_references_of_one_text():
    several = generation_metrics(["a b c d e", "x"], [["q", "a b c d e"], ["x"]])
    assert several == {"bleu": pytest.approx(100), "rouge_l": pytest.approx(100)}
    assert generation_metrics(["a b c d e"], [["q"]])["rouge_l"] == 0


def test_what_cannot_be_is_refused(folder, tmp_path, monkeypatch):
    (tmp_path / "gaps.csv").write_text("source,target\nrain,\n,wine\nrain,fish\n")
    with pytest.raises(DataError, match=r"'source' in row 1; .*'target' in row 0"):
        task(folder, data=str(tmp_path / "gaps.csv")).load()
    for field, value in (("loss", "max"), ("max_target_tokens", 1), ("evaluate_generations", -1)):
        with pytest.raises(ConfigError, match=rf"task\.{field}"):
            task(folder, **{field: value})

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"grape-ray\[metrics\].*evaluate_generations=0"):
        generation_metrics(["a"], [["a"]])
