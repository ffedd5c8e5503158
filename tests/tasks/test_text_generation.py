"""Decoders on prompts and answers: what is learned, what an example is, long texts end to end, and
bad input.
"""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from grape_ray.config.pipelines import pipeline
from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.errors import ConfigError, DataError
from grape_ray.ray_backend.train import train
from grape_ray.tasks import text_generation
from grape_ray.tasks.text_generation import TextGeneration
from grape_ray.training.export import export

PAIRS = [
    ("name: A | food: B", "A serves B."),
    ("x", "Some longer answer, ünïcode."),
    ("", "No prompt."),
    ("y", "End"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny decoders with random weights, saved as Hugging Face saves them, and two tables."""
    root = tmp_path_factory.mktemp("decoders")
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 259}
    llama = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=512, tie_word_embeddings=False, **ids,
    )  # fmt: skip
    transformers.LlamaForCausalLM(llama).save_pretrained(root / "llama")
    opt = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        max_position_embeddings=512, word_embed_proj_dim=32, **ids
    )  # fmt: skip
    transformers.OPTForCausalLM(opt).save_pretrained(root / "opt")
    pq.write_table(
        pa.table({"mr": [p for p, _ in PAIRS], "ref": [a for _, a in PAIRS]}),
        root / "pairs.parquet",
    )
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc "), size=int(n))) for n in rng.integers(200, 400, 24)]
    pq.write_table(pa.table({"text": texts}), root / "long.parquet")
    return root


def task(folder, model="opt", **fields):
    where = {"data": str(folder / "pairs.parquet"), "validation": str(folder / "pairs.parquet")}
    own = {
        "prompt_column": "mr",
        "text_column": "ref",
        "tokenizer": "bytes",
        "max_tokens": 64,
        "public": True,
    }
    return TextGeneration(model=str(folder / model), **{**where, **own, **fields})


@pytest.mark.parametrize("model", ["opt", "llama"])
def test_the_loss_is_the_mean_over_the_answer_alone(folder, model):
    one = task(folder, model)
    records, net = one.load().train, one.build_model(0)
    scored = []
    head: torch.nn.Module = net.get_output_embeddings()  # pyright: ignore
    hook = head.register_forward_hook(lambda *call: scored.append(call[-1].shape[:2]))
    losses = one.per_example_loss(net, one.collate(records, np.arange(4)))
    hook.remove()
    assert scored == [(4, 1 + max(len(answer.encode()) for _, answer in PAIRS))]
    for row, (prompt, answer) in enumerate(PAIRS):
        ids = torch.tensor(
            [[1, *(b + 3 for b in prompt.encode()), *(b + 3 for b in answer.encode()), 2]]
        )
        logits, start = net(input_ids=ids).logits[0], 1 + len(prompt.encode())
        wanted = [-logits[t - 1].log_softmax(-1)[ids[0, t]] for t in range(start, ids.shape[1])]
        torch.testing.assert_close(losses[row], torch.stack(wanted).mean(), rtol=1e-4, atol=1e-5)


def test_evaluation_counts_tokens_not_examples(folder):
    one = task(folder)
    records, net = one.load().train, one.build_model(0)
    found = one.evaluate(net, records)
    lengths = torch.tensor([len(a.encode()) + 1 for _, a in PAIRS], dtype=torch.double)
    losses = one.per_example_loss(net, one.collate(records, np.arange(4))).double()
    assert found["loss"] == pytest.approx(
        float((losses.detach() * lengths).sum() / lengths.sum()), rel=1e-4
    )
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_texts_that_are_written_are_compared_with_all_of_a_prompts_texts(folder, monkeypatch):
    one = task(folder, evaluate_generations=3, max_new_tokens=8)
    records, net = one.load().train, one.build_model(0)
    asked, scores = {}, text_generation.generation_metrics
    monkeypatch.setattr(
        text_generation,
        "generation_metrics",
        lambda texts, told: asked.update(texts=texts, told=told) or scores(texts, told),
    )
    assert set(one.evaluate(net, records)) == {"loss", "perplexity", "bleu", "rouge_l"}
    assert asked["told"] == [[answer] for _, answer in PAIRS[:3]]
    ids = torch.tensor([[1, *(b + 3 for b in PAIRS[1][0].encode())]])
    written = net.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=2
    )
    assert asked["texts"][1] == one.texts_of(written[:, ids.shape[1] :].tolist())[0]
    with pytest.raises(ConfigError, match=r"evaluate_generations.*prompt_column"):
        task(folder, evaluate_generations=3, prompt_column="").load()


def test_texts_are_cut_and_prompts_too_long_are_refused(folder):
    records = task(folder, max_tokens=20).load().train
    assert int(np.diff(records.sequences("input_ids").offsets).max()) == 20
    assert len(task(folder, limit=2).load().train) == 2
    assert task(folder, limit=2).load().dataset_id == task(folder).load().dataset_id  # one budget
    with pytest.raises(DataError, match=r"nothing to learn in row 0.*fewer than max_tokens = 12"):
        task(folder, max_tokens=12).load()
    with pytest.raises(ConfigError, match=r"task\.max_tokens"):
        task(folder, max_tokens=1)
    with pytest.raises(DataError, match=r"column missing.*refs"):
        task(folder, text_column="refs").load()


@pytest.mark.parametrize("method", ["randomized", "grape", "bookkeeping"])
def test_a_long_text_decoder_trains_and_is_exported(folder, tmp_path, method):
    long = {"data": str(folder / "long.parquet"), "validation": str(folder / "long.parquet")}
    config = Config(
        task=task(folder, "llama", **long, prompt_column="", text_column="text", max_tokens=256),
        privacy=Privacy(epsilon=8.0, expected_batch_size=6, steps=2, probes=16),
        method=Method(name=method, rank=4, learning_rate=1e-3, project_min_numel=512),
        performance=Performance(micro_batch_size=3),
    )
    result = train(
        config, run="long", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key")
    )
    assert result.steps == result.charged_steps == 2
    assert 0 < result.metrics["loss"] < 20
    export(str(tmp_path / "runs" / "long"), tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.generate(  # pyright: ignore[reportAttributeAccessIssue]
        input_ids=torch.tensor([[1, 70, 80]]), max_new_tokens=3, do_sample=False
    ).shape == (1, 6)


def test_the_pipeline_is_a_config():
    config = pipeline("pipelines.longcontext_llama")
    assert (config.method.name, config.task.max_tokens, config.privacy.probes) == (
        "randomized",
        4096,
        32,
    )
