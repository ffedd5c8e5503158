"""Texts that a model writes, and where its positions end."""

import pytest
import torch
import transformers

from grape_ray.errors import ConfigError
from grape_ray.tasks.generation import generated


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_text_ends_where_the_positions_of_the_model_do(family):
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, **sizes))
    else:
        config = transformers.OPTConfig(
            vocab_size=50, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=1,
            num_attention_heads=2, ffn_dim=32, max_position_embeddings=12,
        )  # fmt: skip
        model = transformers.OPTForCausalLM(config)
    texts = generated(model, [[5, 6, 7], [8] * 12, [9] * 10], 100, None)
    assert [len(text) for text in texts] == [12 - 3 + 1, 1, 3]
    assert [len(text) for text in generated(model, [[5, 6, 7]], 4, None)] == [4]
    with pytest.raises(ConfigError, match=r"13 tokens.*12 positions"):
        generated(model, [[5] * 13], 4, None)
