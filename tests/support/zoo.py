"""Small real models: one module a rule, and the families of Hugging Face with random weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from torch.nn.utils import parametrizations

VOCAB, ROWS, LENGTH = 61, 4, 7
_SIZE = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def class_loss(model, batch):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


def lm_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
    ).sum(1)


def seq2seq_loss(model, batch):
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=batch["input_ids"],
    ).logits
    return F.cross_entropy(logits.transpose(1, 2), batch["input_ids"], reduction="none").sum(1)


def text_batch(rows=ROWS, length=LENGTH, seed=0, padded=True):
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.long)
    if padded and rows > 1:
        mask[1, length - 2 :] = 0
    ids = torch.randint(5, VOCAB, (rows, length), generator=g)
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": torch.randint(0, 2, (rows,), generator=g),
    }


def image_batch(rows=ROWS, length=LENGTH, seed=0, padded=True):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, 8, 8, generator=g, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(0, 2, (rows,), generator=g)}


def _causal(kind, **config):
    return lambda: getattr(hf, f"{kind}ForCausalLM")(
        getattr(hf, f"{kind}Config")(**{**_SIZE, **_TOKENS, **config})
    )


def _classifier(kind, **config):
    return lambda: getattr(hf, f"{kind}ForSequenceClassification")(
        getattr(hf, f"{kind}Config")(**{**_SIZE, **_TOKENS, **config})
    )


def _gpt2():
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_TOKENS)
    )


def _opt():
    config = {**_SIZE, "ffn_dim": _SIZE["intermediate_size"], "word_embed_proj_dim": 32, **_TOKENS}
    return hf.OPTForCausalLM(hf.OPTConfig(**config))


def _distilbert():
    config = hf.DistilBertConfig(
        vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64
    )
    return hf.DistilBertForSequenceClassification(config)


def _t5():
    config = hf.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,  # pyright: ignore[reportCallIssue]
    )
    return hf.T5ForConditionalGeneration(config)


def _vit():
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            image_size=8, patch_size=2, num_labels=2  # pyright: ignore[reportCallIssue]
        )
    )  # fmt: skip


def lora(make, targets):
    def build():
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(
            make(), LoraConfig(r=4, target_modules=list(targets), lora_dropout=0.0)
        )
        for param in model.parameters():
            if param.requires_grad:
                nn.init.normal_(param, std=0.1)  # LoRA's B starts at zero, which would hide errors
        return model

    return build


# name -> (build, loss, batch)
FAMILIES = {
    "BERT": (_classifier("Bert"), class_loss, text_batch),
    "RoBERTa": (_classifier("Roberta"), class_loss, text_batch),
    "DistilBERT": (_distilbert, class_loss, text_batch),
    "GPT-2 (tied)": (_gpt2, lm_loss, text_batch),
    "OPT (tied)": (_opt, lm_loss, text_batch),
    "Llama": (_causal("Llama", num_key_value_heads=2), lm_loss, text_batch),
    "Llama (tied)": (
        _causal("Llama", num_key_value_heads=2, tie_word_embeddings=True),
        lm_loss,
        text_batch,
    ),
    "Qwen2": (
        _causal("Qwen2", num_key_value_heads=2, tie_word_embeddings=False),
        lm_loss,
        text_batch,
    ),
    "Qwen2 (tied)": (
        _causal("Qwen2", num_key_value_heads=2, tie_word_embeddings=True),
        lm_loss,
        text_batch,
    ),
    "GPT-NeoX": (_causal("GPTNeoX"), lm_loss, text_batch),
    "ViT": (_vit, class_loss, image_batch),
    "T5": (_t5, seq2seq_loss, text_batch),
    "LoRA on RoBERTa": (lora(_classifier("Roberta"), ["query", "value"]), class_loss, text_batch),
    "LoRA on Llama": (
        lora(_causal("Llama", num_key_value_heads=2), ["q_proj", "v_proj"]),
        lm_loss,
        text_batch,
    ),
    "LoRA on GPT-2": (lora(_gpt2, ["c_attn"]), lm_loss, text_batch),
}


def build_family(name):
    build, loss, batch = FAMILIES[name]
    torch.manual_seed(0)
    return build().double().eval(), loss, batch


class Small(nn.Module):
    """A layer under test between a first and a last one, so that gradients flow through it both
    ways.
    """

    def __init__(self, layer, width=12, call=None):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(5, width), layer, nn.Linear(width, 3)
        self.call = call or (lambda layer, x: layer(x))

    def forward(self, x):
        out = self.call(self.layer, torch.tanh(self.first(x)))
        return self.last(out).pow(2).flatten(1).sum(1)


class Bare(nn.Module):
    """Bare parameters in every position that real models put them: scale, shift, prefix token,
    table, left factor, cast.
    """

    def __init__(self, width=12, length=6):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, length + 1, width))
        self.scale = nn.Parameter(torch.randn(width))
        self.shift = nn.Parameter(torch.randn(width))
        self.gate = nn.Parameter(torch.randn(()))
        self.table = nn.Parameter(torch.randn(9, width))
        self.mix = nn.Parameter(torch.randn(length + 1, length + 1))

    def forward(self, x):
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.place
        x = (1 + self.scale.double().to(x.dtype)) * x - self.shift
        x = x + self.table[torch.arange(x.shape[1]) % 9] * self.gate
        x = self.mix @ x
        return x + self.table[(x[..., 0] > 0).long()]


class Tied(nn.Module):
    """One weight as embedding, as linear map, transposed, and twice."""

    def __init__(self, width=12):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width, padding_idx=0)
        self.square = nn.Linear(width, width)

    def forward(self, ids):
        x = self.embed(ids)
        x = torch.tanh(self.square(self.square(x)) @ self.square.weight)
        return F.linear(x, self.embed.weight)


class Relative(nn.Module):
    """A (T, T) table that must not be taken for the batch when B = T."""

    def __init__(self, width=12):
        super().__init__()
        self.bias, self.inner = nn.Embedding(VOCAB, 2), nn.Linear(width, width)

    def forward(self, x):
        n = torch.arange(x.shape[1])
        bias = self.bias((n[:, None] - n[None, :]).abs()).permute(2, 0, 1).unsqueeze(0)
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)
        attention = (heads @ heads.transpose(2, 3) + bias).softmax(-1)
        return self.inner((attention @ heads).transpose(1, 2).flatten(2))


class Flat(nn.Module):
    """OPT's habit: (B*T, H) around a layer, so that each token looks like an example."""

    def __init__(self, width=12):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return self.inner(self.norm(x.reshape(-1, x.shape[-1]))).view(x.shape)


class Steps(nn.Module):
    """A recurrent cell, step by step."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state, out = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(out, 1)


class Written(nn.Module):
    """A parameter that is written, spread and cast in the ways that code from elsewhere does it."""

    def __init__(self, width=12):
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.inner, self.empty = nn.Linear(width, width), nn.Parameter(torch.empty(0, 4))
        self.one = nn.Embedding(1, width)

    def forward(self, x):
        rows, length = x.shape[:2]
        z = x.clone()
        z[:, 0] = self.token
        z[:, 1].copy_(self.scale)
        z = z.index_put((torch.arange(rows), torch.full((rows,), 2)), self.token)
        z = z * self.scale.broadcast_to(x.shape) + self.scale.tile(rows, length, 1)
        z = torch.cat([z, self.token[None, None].repeat_interleave(rows, 0)], 1)[:, 1:]
        z = z + self.one(torch.zeros(rows, length, dtype=torch.long))
        with torch.no_grad():
            size = self.inner.weight.norm()
        return F.linear(z, self.inner.weight.type_as(z) / size, self.inner.bias)


class Standardised(nn.Conv1d):
    """A convolution whose weight is standardised first."""

    def forward(self, x):
        var, mean = torch.var_mean(self.weight, dim=[1, 2], keepdim=True)
        return F.conv1d(x, (self.weight - mean) / (var + 1e-6).sqrt(), self.bias, padding=1)


class Fourier(nn.Module):
    """A Fourier layer whose complex weight is held as pairs of real numbers."""

    def __init__(self, width=12, modes=3):
        super().__init__()
        self.weight, self.modes = nn.Parameter(torch.randn(width, width, modes, 2) / width), modes

    def forward(self, x):
        spectrum = torch.fft.rfft(x.transpose(1, 2).contiguous())
        out = torch.zeros_like(spectrum)
        weight = torch.view_as_complex(self.weight)
        out[:, :, : self.modes] = torch.einsum("bix,iox->box", spectrum[:, :, : self.modes], weight)
        return torch.fft.irfft(out, n=x.shape[1]).transpose(1, 2)


class ScaledByOnePlus(nn.Module):
    """Gemma's norm, many times: an operation on a parameter alone whose first dimension may divide
    by anything.
    """

    def __init__(self, width=12, depth=12):
        super().__init__()
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.randn(width) / 9) for _ in range(depth)]
        )

    def forward(self, x):
        for weight in self.weights:
            x = torch.tanh(x) * (1 + weight)
        return x


def _channels(layer):
    return lambda: Small(layer(), call=lambda inner, x: inner(x.transpose(1, 2)).transpose(1, 2))


LAYERS = {
    "Linear": lambda: Small(nn.Linear(12, 12)),
    "Linear without bias": lambda: Small(nn.Linear(12, 12, bias=False)),
    "LayerNorm": lambda: Small(nn.LayerNorm(12)),
    "LayerNorm without bias": lambda: Small(nn.LayerNorm(12, bias=False)),
    "LayerNorm over two dimensions": lambda: Small(nn.LayerNorm((6, 12))),
    "RMSNorm": lambda: Small(nn.RMSNorm(12)),
    "GroupNorm": _channels(lambda: nn.GroupNorm(3, 12)),
    "BatchNorm in eval": _channels(lambda: nn.BatchNorm1d(12).eval()),
    "Conv1d": _channels(lambda: nn.Conv1d(12, 12, 3, padding=1)),
    "Conv1d, strided and dilated": _channels(lambda: nn.Conv1d(12, 12, 2, stride=2, dilation=2)),
    "Conv1d, grouped (vmap)": _channels(lambda: nn.Conv1d(12, 12, 3, groups=12)),
    "Conv1d, padding as a word (vmap)": _channels(lambda: nn.Conv1d(12, 12, 3, padding="same")),
    "ConvTranspose1d (vmap)": _channels(lambda: nn.ConvTranspose1d(12, 12, 3)),
    "Conv2d": lambda: Small(
        nn.Conv2d(2, 2, (2, 3), padding=(1, 1), stride=(1, 1)),
        call=lambda inner, x: (
            inner(x.unflatten(2, (2, 6)).transpose(1, 2)).transpose(1, 2).flatten(2)[..., :12]
        ),
    ),
    "Bilinear (vmap)": lambda: Small(nn.Bilinear(12, 12, 12), call=lambda inner, x: inner(x, x)),
    "weight norm (computed weight)": lambda: Small(parametrizations.weight_norm(nn.Linear(12, 12))),
    "PReLU": lambda: Small(nn.PReLU()),
    "bare parameters": lambda: Small(Bare()),
    "reused module": lambda: Small(
        nn.Linear(12, 12), call=lambda inner, x: inner(torch.tanh(inner(x)))
    ),
    "LSTM": lambda: Small(nn.LSTM(12, 12, batch_first=True), call=lambda inner, x: inner(x)[0]),
    "LSTM, two layers, both ways, projected, time-major": lambda: Small(
        nn.LSTM(12, 12, num_layers=2, bidirectional=True, proj_size=6),
        call=lambda inner, x: inner(x.transpose(0, 1))[0].transpose(0, 1),
    ),
    "GRU": lambda: Small(nn.GRU(12, 12, batch_first=True), call=lambda inner, x: inner(x)[0]),
    "RNN without bias": lambda: Small(
        nn.RNN(12, 12, bias=False, batch_first=True), call=lambda inner, x: inner(x)[0]
    ),
    "LSTM cell": lambda: Small(Steps(nn.LSTMCell(12, 12))),
    "GRU cell": lambda: Small(Steps(nn.GRUCell(12, 12))),
    "RNN cell": lambda: Small(Steps(nn.RNNCell(12, 12))),
    "attention": lambda: Small(
        nn.MultiheadAttention(12, 3, batch_first=True), call=lambda inner, x: inner(x, x, x)[0]
    ),
    "attention with key and value biases, time-major": lambda: Small(
        nn.MultiheadAttention(12, 3, add_bias_kv=True),
        call=lambda inner, x: inner(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(
            0, 1
        ),
    ),
    "transformer encoder layer": lambda: Small(
        nn.TransformerEncoderLayer(12, 3, 16, dropout=0.0, batch_first=True)
    ),
    "written, spread and cast": lambda: Small(Written()),
    "standardised convolution (computed weight)": lambda: Small(
        Standardised(12, 12, 3), call=lambda inner, x: inner(x.transpose(1, 2)).transpose(1, 2)
    ),
    "complex weight as pairs": lambda: Small(Fourier()),
    "one plus weight": lambda: Small(ScaledByOnePlus()),
    "two heads in one einsum": lambda: Small(
        nn.ParameterList([nn.Parameter(torch.randn(12, 2, 6))]),
        call=lambda inner, x: torch.einsum("tbi,ihd->bthd", x.transpose(0, 1), inner[0]).flatten(2),
    ),
    "unused module": lambda: Small(
        nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)]), call=lambda inner, x: inner[0](x)
    ),
    "relative positions, B = T": lambda: Small(Relative()),
    "flattened tokens": lambda: Small(Flat()),
    "einsum (vmap)": lambda: Small(
        nn.Linear(12, 12),
        call=lambda inner, x: torch.einsum("bti,oi->bto", x, inner.weight) + inner.bias,
    ),
}


def build_layer(name):
    torch.manual_seed(0)
    return LAYERS[name]().double()


def layer_batch(rows=6, length=6, seed=0):
    return {
        "x": torch.randn(
            rows, length, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
    }


def layer_loss(model, batch):
    return model(batch["x"])
