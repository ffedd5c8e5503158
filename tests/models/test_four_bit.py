"""Adapters beside weights in four bits: exact to the oracle, trained, exported, or refused."""

import json
import os
import sys
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch

from grape_ray.config.description import read_run, rebuild_config
from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.engines import make_engine
from grape_ray.errors import ConfigError
from grape_ray.models.adapters import Lora, adapted
from grape_ray.models.hugging_face import load_classifier, load_language_model
from grape_ray.ray_backend.train import train
from grape_ray.storage import Storage
from grape_ray.tasks.text_classification import TextClassification
from grape_ray.tasks.text_generation import TextGeneration
from grape_ray.training.build import newest_checkpoint, trained_model
from grape_ray.training.export import export
from grape_ray.training.predict import predict
from tests.support.oracle import expected, median_norm, worst
from tests.support.word_model import WORDS, save_decoder, save_encoder
from tests.support.zoo import class_loss, lm_loss

LORA = Lora(rank=8, merge=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder and an encoder with random weights, and texts with labels."""
    root = tmp_path_factory.mktemp("four-bit")
    save_decoder(root / "llama")
    save_encoder(root / "bert")
    rows = [
        {"text": " ".join(WORDS[n % 5 : n % 5 + n % 4 + 2]), "label": "ab"[n % 2]}
        for n in range(60)
    ]
    (root / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def task(folder, kind=TextGeneration, **fields):
    model = str(folder / ("llama" if kind is TextGeneration else "bert"))
    own = {"held_out": 0.3, "public": True, "lora": LORA, "weights": "nf4", "max_tokens": 24}
    own |= {"labels": ("a", "b")} if kind is TextClassification else {}
    return kind(**{"model": model, "data": str(folder / "texts.jsonl"), **own, **fields})


def config(one, **performance):
    return Config(
        task=one,
        privacy=Privacy(expected_batch_size=16, steps=2, delta=1e-4),
        method=Method(name="bookkeeping", learning_rate=0.1),
        performance=Performance(micro_batch_size=4, **performance),
    )


def where(tmp_path):
    return {"run": "t", "storage": str(tmp_path / "runs"), "key_path": str(tmp_path / "key")}


def layers(model) -> dict[str, Any]:
    bnb = pytest.importorskip("bitsandbytes")
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def dequantised(model, reference):
    """The reference in double precision, with what the model in four bits computes with."""
    bnb = pytest.importorskip("bitsandbytes")
    reference.double()
    mine, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert mine.keys() == theirs.keys()
    packed = {f"{name}.weight": module.weight for name, module in layers(model).items()}
    with torch.no_grad():
        for name, param in theirs.items():
            if name in packed:
                state = packed[name].quant_state
                param.copy_(bnb.functional.dequantize_4bit(packed[name].data, state))
            else:
                param.copy_(mine[name])
    return reference


@pytest.mark.parametrize("method", ["bookkeeping", "grape"])
@pytest.mark.parametrize(
    ("compute", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_adapters_equal_the_definition_on_the_dequantised_base(
    folder, kind, compute, limit, method
):
    pytest.importorskip("bitsandbytes")
    place, loss = str(folder / kind), lm_loss if kind == "llama" else class_loss

    def made(weights):
        if kind == "llama":
            return adapted(load_language_model(place, 0, weights=weights), LORA, (), 0)
        return adapted(load_classifier(place, 2, 0, weights=weights), LORA, (), 0)

    model = made("nf4")
    assert len(layers(model)) >= 6
    assert all(module.weight.dtype == torch.uint8 for module in layers(model).values())
    for name, param in model.named_parameters():
        if "lora_B" in name:  # zero at first, so that the other factor had no gradient
            torch.nn.init.normal_(param, std=0.1)
        if compute == torch.float32 and param.dtype == torch.bfloat16:
            param.data = param.data.float()
    for module in layers(model).values():
        module.compute_dtype = module.weight.quant_state.dtype = compute
        if module.bias is not None:
            module.bias.data = module.bias.data.to(compute)
    torch.manual_seed(0)
    ids = torch.randint(1, 12, (4, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "bert":
        batch["labels"] = torch.tensor([0, 1, 1, 0])
    reference = dequantised(model, made("fp32"))
    options = {"rank": 4, "project_min_numel": 200, "key": b"k"}
    clip_norm = median_norm(reference, loss, batch, 4)
    engine = make_engine(model, method, clip_norm, **options)
    assert all("lora_" in name or "classifier" in name for name in engine.params)
    summed = engine.clipped_sum(loss, batch)
    wanted = expected(make_engine(reference, method, clip_norm, **options), loss, batch, 4)
    assert worst(summed.tensors, wanted) < limit


@pytest.mark.parametrize("where_to", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", [TextGeneration, TextClassification])
def test_a_run_is_exported_as_adapters_and_predicts(folder, tmp_path, kind, where_to):
    pytest.importorskip("bitsandbytes")
    one = task(folder, kind)
    result = train(config(one, use_gpu=where_to == "cuda"), **where(tmp_path))
    assert result.steps == result.charged_steps == 2
    run, out = tmp_path / "runs" / "t", tmp_path / "out"
    assert predict(str(run), str(folder / "texts.jsonl"), tmp_path / "answers.jsonl") == 60
    export(str(run), out)
    found = trained_model(
        rebuild_config(read_run(Storage(str(run)))), newest_checkpoint(Storage(str(run)))
    )
    if kind is TextGeneration:
        base = load_language_model(one.model, 0, weights="nf4")
    else:
        base = load_classifier(one.model, 2, 0, weights="nf4")
    again = peft.PeftModel.from_pretrained(base, str(out)).eval()
    ids = torch.tensor([[3, 4, 5]])
    mine, theirs = found.eval()(input_ids=ids).logits, again(input_ids=ids).logits
    torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.02, atol=0.02)
    with again.disable_adapter():
        assert float((again(input_ids=ids).logits - theirs).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("fields", "performance", "part"),
    [
        ({"lora": Lora()}, {}, r"task\.weights=nf4.*no adapters.*task\.lora\.rank"),
        ({"lora": Lora(rank=8)}, {}, r"task\.lora\.merge.*task\.lora\.merge=false"),
        ({"trainable": ("*q_proj*",)}, {}, r"task\.trainable.*q_proj.*four bits"),
        ({}, {"sharded": True, "num_workers": 2}, r"performance\.sharded.*four bits"),
    ],
)
def test_what_four_bits_cannot_do_is_refused(folder, tmp_path, fields, performance, part):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match=part):
        train(config(task(folder, **fields), **performance), **where(tmp_path))
    assert not os.path.exists(tmp_path / "runs" / "t")


def test_without_the_library_it_is_refused_by_name(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"bitsandbytes.*grape-ray\[quantized\].*bf16"):
        train(config(task(folder)), **where(tmp_path))
    assert not os.path.exists(tmp_path / "runs" / "t")
    with pytest.raises(ConfigError, match=r"task\.weights.*fp32, bf16, nf4"):
        replace(task(folder), weights="int4")
