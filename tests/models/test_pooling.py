"""Mean pooling: the head reads the mean of a text's tokens, and the model is one that transformers
loads.
"""

from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import layer_norm

from grape_ray.errors import ConfigError
from grape_ray.models.adapters import UPPER_HALF, Lora, adapted
from grape_ray.models.pooling import with_mean_pooling
from grape_ray.tasks.text_classification import TextClassification

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 0, "num_labels": 3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
FAMILIES = [
    (transformers.BertConfig, transformers.BertForSequenceClassification),
    (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
]


def texts():
    ids = torch.randint(1, 64, (5, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([9, 4, 2, 7, 1])[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("config", "kind"), FAMILIES)
def test_the_block_is_what_it_comes_to(config, kind, padded, attention):
    torch.manual_seed(0)
    model: Any = with_mean_pooling(kind(config(**SIZES, attn_implementation=attention)).eval(), "m")
    batch = texts() if padded else {"input_ids": texts()["input_ids"][:1]}
    logits = model(**batch).logits
    block = model.base_model.encoder.layer[-1]
    short = torch.autograd.grad(logits.sum(), model.base_model.embeddings.word_embeddings.weight)
    del block.forward  # the class's own is left
    whole = model(**batch).logits
    torch.testing.assert_close(logits, whole)
    long = torch.autograd.grad(whole.sum(), model.base_model.embeddings.word_embeddings.weight)
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("config", "kind"), FAMILIES)
def test_the_first_token_becomes_the_mean_of_all_that_are_no_padding(config, kind, tmp_path):
    torch.manual_seed(0)
    model: Any = kind(config(**SIZES)).eval()
    batch = texts()
    with torch.no_grad():
        hidden = model.base_model(**batch).last_hidden_state
        count = batch["attention_mask"].sum(1, keepdim=True)
        means = (hidden * batch["attention_mask"][:, :, None]).sum(1) / count
        with_mean_pooling(model, "m")
        pooled = model.base_model(**batch).last_hidden_state[:, 0]
        answers = model(**batch).logits
    # the first token itself is a hundredth of what is normalised
    assert float((pooled - layer_norm(means, (16,))).abs().max()) < 0.05
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(auto(**batch).logits, answers)
    again = with_mean_pooling(auto, "m")  # which an export's own config asks for
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, answers)
    frozen = {n for n, p in again.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(".layer.2." in name for name in frozen)
    half = adapted(again, Lora(), (UPPER_HALF,), 0)  # of its own two layers
    trained = {n for n, p in half.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in half.named_parameters() if ".layer.1." in n}


def test_a_model_of_another_build_is_refused_by_name():
    sizes = {"vocab_size": 64, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    other = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes))
    with pytest.raises(ConfigError, match=r"task\.model m.*DistilBert.*task\.pooling=first"):
        with_mean_pooling(other, "m")
    with pytest.raises(ConfigError, match=r"task\.pooling.*first or mean"):
        TextClassification(model="m", data="d", pooling="men")
