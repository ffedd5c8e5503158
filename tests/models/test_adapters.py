"""Adapters and frozen weights: what is trained, noised and exported."""

import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers

from grape_ray.config.description import describe, rebuild_config
from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.engines import make_engine
from grape_ray.errors import ConfigError
from grape_ray.models.adapters import UPPER_HALF, Lora, adapted
from grape_ray.ray_backend.train import train
from grape_ray.tasks.text_generation import TextGeneration
from grape_ray.training.export import export
from tests.support.oracle import expected, worst
from tests.support.zoo import class_loss, lm_loss, text_batch


def roberta():
    config = transformers.RobertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    config.num_labels = 3
    return transformers.RobertaForSequenceClassification(config).eval()


def llama():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["bookkeeping", "grape"])
@pytest.mark.parametrize(("make", "loss"), [(roberta, class_loss), (llama, lm_loss)])
def test_adapters_alone_are_clipped_and_equal_the_definition(make, loss, method):
    torch.manual_seed(0)
    model = adapted(make(), Lora(rank=8), (), 0).double()
    for name, param in model.named_parameters():
        if "lora_B" in name:  # zero at first, so that the other factor had no gradient
            torch.nn.init.normal_(param, std=0.1)
    batch = text_batch()
    if make is roberta:
        batch["labels"] = batch["labels"] % 3 if "labels" in batch else torch.tensor([0, 1, 2, 0])
    engine = make_engine(model, method, 0.01, rank=4, project_min_numel=100)
    summed = engine.clipped_sum(loss, batch)
    assert summed.tensors.keys() == shapes(model).keys()
    assert all("lora_" in name or "classifier" in name for name in summed.tensors)
    rows = len(batch["input_ids"])
    assert worst(summed.tensors, expected(engine, loss, batch, rows)) < 1e-10


def test_the_count_of_what_is_noised():
    """Two linear layers of side 16 a layer have 8 (16 + 16) numbers each at rank 8."""
    model = adapted(roberta(), Lora(rank=8, targets=("query", "value")), (), 0)
    head = 16 * 16 + 16 + 3 * 16 + 3
    assert make_engine(model, "bookkeeping").coordinates == 2 * 2 * 8 * (16 + 16) + head


def test_adapters_are_a_function_of_the_seed():
    one, same, other = (adapted(llama(), Lora(rank=2), (), seed) for seed in (0, 0, 1))
    picked = [
        next(p for name, p in model.named_parameters() if "lora_A" in name)
        for model in (one, same, other)
    ]
    assert torch.equal(picked[0], picked[1])
    assert not torch.equal(picked[0], picked[2])


def test_patterns_say_what_is_trained():
    assert set(shapes(adapted(roberta(), Lora(), ("classifier.*",), 0))) == {
        f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")
    }
    assert all(name.endswith("bias") for name in shapes(adapted(roberta(), Lora(), ("*bias",), 0)))
    halves = shapes(adapted(roberta(), Lora(), (UPPER_HALF, "*.out_proj.bias"), 0))
    assert set(halves) == {n for n in shapes(roberta()) if ".layer.1." in n or "out_proj.bias" in n}
    with_norms = shapes(adapted(llama(), Lora(rank=2, targets=("q_proj",)), ("*norm*",), 0))
    assert sum("norm" in name for name in with_norms) == 5
    assert sum("lora" in name for name in with_norms) == 4


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            {"lora": Lora(rank=2, targets=("qproj",))},
            r"task\.lora\.targets.*did you mean '\w+_proj",
        ),
        ({"trainable": ("clasifier.*",)}, r"task\.trainable"),
    ],
)
def test_names_that_are_not_there_are_refused(change, part):
    with pytest.raises(ConfigError, match=part):
        adapted(llama(), change.get("lora", Lora()), change.get("trainable", ()), 0)
    for field, value in (("rank", -1), ("alpha", 0.0), ("dropout", 1.0)):
        with pytest.raises(ConfigError, match=rf"task\.lora\.{field}"):
            Lora(**{field: value})


@pytest.fixture
def task(tmp_path):
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 259}
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **ids
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    texts = [json.dumps({"text": f"{'some ' * (n % 5)}text {n}"}) for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    return TextGeneration(
        model=str(tmp_path / "llama"), data=str(tmp_path / "texts.jsonl"), held_out=0.3,
        public=True, tokenizer="bytes", max_tokens=24, lora=Lora(rank=8),
    )  # fmt: skip


@pytest.mark.parametrize(("merge", "weights"), [(True, "fp32"), (False, "fp32"), (False, "bf16")])
def test_a_run_with_adapters_is_exported_whole_or_as_adapters(task, tmp_path, merge, weights):
    task = replace(task, lora=replace(task.lora, merge=merge), weights=weights)
    config = Config(
        task=task,
        privacy=Privacy(expected_batch_size=8, steps=2, delta=1e-4),
        method=Method(name="bookkeeping", learning_rate=0.1),
        performance=Performance(micro_batch_size=4),
    )
    assert rebuild_config(json.loads(json.dumps(describe(config)))) == replace(
        config, performance=Performance()
    )
    result = train(config, run="t", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    assert result.steps == 2
    export(str(tmp_path / "runs" / "t"), tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(task.model)
    ids = torch.tensor([[1, 70, 80]])
    if merge:
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        again = peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))
        kinds = {p.dtype for name, p in again.named_parameters() if "lora" in name}
        assert kinds == {torch.float32}
    assert again(input_ids=ids).logits.shape == (1, 3, 259)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(task.model)
    difference = again(input_ids=ids).logits - fresh(input_ids=ids).logits
    assert float(difference.abs().max()) > 1e-3  # it was trained
