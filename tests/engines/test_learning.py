"""What an engine learns of a model before it is sharded: enough for every batch, or it says so."""

import numpy as np
import pytest
import torch
import transformers

from grape_ray.data.arrays import Ragged, Records
from grape_ray.engines import make_engine
from grape_ray.errors import UnsupportedLayer
from grape_ray.tasks.decoders import learned_tokens, next_token_losses


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
        max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval()


def loss(model, batch):
    losses, learned = next_token_losses(model, **batch)
    return losses.sum(1) / learned.sum(1).clamp(min=1)


def batch_of(lengths):
    rng = np.random.default_rng(len(lengths))
    ids = Ragged.of([rng.integers(3, 64, n) for n in lengths])
    padded, mask = Records({"ids": ids}).sequences("ids").padded(np.arange(len(ids)), 0)
    return {"ids": padded, **learned_tokens(padded, mask.bool())}


@pytest.mark.parametrize("lengths", [(21, 64), (21, 64, 30), (21, 64, 30, 40, 50, 60, 33)])
def test_what_was_learned_serves_every_batch_or_is_refused(decoder, lengths):
    """Of two texts, rows may be read one way or the other."""
    engine = make_engine(decoder, "dp_adam")
    try:
        layouts = engine.learn(loss, batch_of(lengths))
    except UnsupportedLayer:
        assert len(lengths) == 2
        return
    sharded = make_engine(decoder, "dp_adam")
    sharded.adopt(layouts)
    for others in ((5,), (9, 9), (21, 64), (7, 8, 9), (30, 64, 12, 50, 64, 64, 3, 2)):
        summed = sharded.clipped_sum(loss, batch_of(others)).tensors
        wanted = make_engine(decoder, "dp_adam").clipped_sum(loss, batch_of(others)).tensors
        assert all(torch.allclose(summed[name], wanted[name], atol=1e-6) for name in wanted)
