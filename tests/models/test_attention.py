"""The attention kernel of a model on a CPU."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertModel

from grape_ray.models.attention import plain_attention_on_cpu


def _model() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return BertModel._from_config(config, attn_implementation="sdpa").eval()


def test_plain_attention_says_the_same():
    model = _model()
    words = {
        "input_ids": torch.arange(18).reshape(2, 9),
        "attention_mask": torch.tensor([[1] * 9, [1] * 4 + [0] * 5]),
    }
    with torch.no_grad():
        before = model(**words).last_hidden_state[1, :4]
        plain_attention_on_cpu(model, 9)
        after = model(**words).last_hidden_state[1, :4]
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(after, before)


def test_long_sequences_and_other_models_stay_as_they_are():
    model = _model()
    plain_attention_on_cpu(model, 513)
    assert model.config._attn_implementation == "sdpa"
    plain_attention_on_cpu(nn.Linear(2, 2), 9)
