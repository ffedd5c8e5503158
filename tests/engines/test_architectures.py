"""Architectures whose shapes mislead: trained exactly at depth, or refused with the true reason."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from grape_ray import make_engine
from grape_ray.errors import UnsupportedLayer
from tests.support import zoo
from tests.support.oracle import expected, median_norm, worst

_TEXT = {
    "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = {name: value for name, value in _TEXT.items() if name != "head_dim"} | {
    "num_hidden_layers": 2
}


def _causal(kind, config, **more):
    return lambda: getattr(hf, f"{kind}ForCausalLM")(getattr(hf, config)(**{**_TEXT, **more}))


class TorchvisionViT(nn.Module):
    """The vision transformer as torchvision writes it: patches, a class token, torch's own
    attention, batch first.
    """

    def __init__(self, width=12, depth=9):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token, self.places = (
            nn.Parameter(torch.randn(1, 1, width)),
            nn.Parameter(torch.randn(1, 5, width) / 9),
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.LayerNorm(width),
                    nn.MultiheadAttention(width, 2, batch_first=True),
                    nn.LayerNorm(width),
                    nn.Linear(width, width),
                ]
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, pixel_values):
        x = self.patches(pixel_values).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for first, attention, second, mlp in self.blocks:  # pyright: ignore[reportGeneralTypeIssues]
            y = first(x)
            x = x + attention(y, y, y, need_weights=False)[0]
            x = x + F.gelu(mlp(second(x)))
        return type("Output", (), {"logits": self.head(x[:, 0])})


TRAINED = {
    "Gemma": (_causal("Gemma", "GemmaConfig"), zoo.lm_loss, zoo.text_batch),
    "Gemma 2": (_causal("Gemma2", "Gemma2Config"), zoo.lm_loss, zoo.text_batch),
    "Gemma 3": (_causal("Gemma3", "Gemma3TextConfig"), zoo.lm_loss, zoo.text_batch),
    "Swin": (
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=8,
                patch_size=1,
                embed_dim=8,
                depths=[2, 2],
                num_heads=[2, 2],
                window_size=2,
                drop_path_rate=0.0,
            )
        ),
        zoo.class_loss,
        zoo.image_batch,
    ),
    "PoolFormer": (
        lambda: hf.PoolFormerForImageClassification(
            hf.PoolFormerConfig(
                depths=[2, 2, 1, 1],
                hidden_sizes=[4, 6, 8, 8],
                patch_sizes=[3] * 4,
                strides=[2, 2, 1, 1],
                padding=[1] * 4,
            )
        ),
        zoo.class_loss,
        zoo.image_batch,
    ),
    "BEiT": (
        lambda: hf.BeitForImageClassification(
            hf.BeitConfig(
                image_size=8,
                patch_size=4,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                use_relative_position_bias=True,
                drop_path_rate=0.0,
            )
        ),
        zoo.class_loss,
        zoo.image_batch,
    ),
    "DeBERTa-v2": (
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(
                vocab_size=61,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                pad_token_id=0,
                relative_attention=True,
                pos_att_type=["c2p", "p2c"],
                position_buckets=8,  # pyright: ignore[reportCallIssue]
                norm_rel_ebd="layer_norm",  # pyright: ignore[reportCallIssue]
                share_att_key=True,  # pyright: ignore[reportCallIssue]
            )
        ),
        zoo.class_loss,
        zoo.text_batch,
    ),
    "Longformer": (
        lambda: hf.LongformerForSequenceClassification(
            hf.LongformerConfig(
                vocab_size=61,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                attention_window=4,
                max_position_embeddings=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        zoo.class_loss,
        zoo.text_batch,
    ),
    "torchvision's ViT": (TorchvisionViT, zoo.class_loss, zoo.image_batch),
}


@pytest.mark.parametrize("name", TRAINED)
def test_trained_exactly_at_depth(name):
    build, loss, make_batch = TRAINED[name]
    torch.manual_seed(0)
    model = build().double().eval()
    for method in ("grape", "bookkeeping"):
        batch, size = make_batch(), zoo.ROWS
        made = make_engine(
            model,
            method,
            median_norm(model, loss, batch, size),
            key=b"k",
            rank=2,
            project_min_numel=300,
        )
        assert (
            worst(made.clipped_sum(loss, batch).tensors, expected(made, loss, batch, size)) < 1e-9
        )
        batch, size = make_batch(rows=3, length=6, seed=1), 3
        assert (
            worst(made.clipped_sum(loss, batch).tensors, expected(made, loss, batch, size)) < 1e-9
        )


EXPERTS = {
    "Mixtral": ("MixtralForCausalLM", hf.MixtralConfig, {"num_local_experts": 3}),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        hf.DeepseekV3Config,
        {
            "n_routed_experts": 4,
            "num_key_value_heads": 2,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 2,
            "first_k_dense_replace": 0,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "moe_intermediate_size": 8,
        },
    ),
    "GPT-OSS": (
        "GptOssForCausalLM",
        hf.GptOssConfig,
        {"num_local_experts": 4, "layer_types": ["full_attention"] * 2},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_by_value_are_refused_with_the_true_reason(name, dtype):
    kind, config, more = EXPERTS[name]
    torch.manual_seed(0)
    model = getattr(hf, kind)(config(**{**_EXPERTS, **more})).to(dtype).eval()
    with pytest.raises(
        UnsupportedLayer, match=r"picked across examples by their values.*batched_mm"
    ):
        make_engine(model, "bookkeeping", 1.0).clipped_sum(
            lambda m, b: zoo.lm_loss(m, b).float(), zoo.text_batch()
        )


def test_experts_in_place_are_trained():
    torch.manual_seed(0)
    model = (
        hf.MixtralForCausalLM(hf.MixtralConfig(**{**_EXPERTS, "num_local_experts": 3}))
        .double()
        .eval()
    )
    model.set_experts_implementation("batched_mm")
    batch = zoo.text_batch()
    made = make_engine(model, "bookkeeping", median_norm(model, zoo.lm_loss, batch, zoo.ROWS))
    assert (
        worst(
            made.clipped_sum(zoo.lm_loss, batch).tensors,
            expected(made, zoo.lm_loss, batch, zoo.ROWS),
        )
        < 1e-9
    )
