"""Tiny models with random weights and a tokenizer of whole words, as Hugging Face saves them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["grape", "wine", "rain", "stone", "glass", "salt", "tree", "fish", "milk", "corn"]


def save_tokenizer(folder: Path, **options: str) -> int:
    """Writes the tokenizer; returns the number of its tokens."""
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]"
    )
    for name, value in options.items():
        setattr(made, name, value)
    made.save_pretrained(folder)
    return len(vocabulary)


def save_encoder(folder: Path, layers: int = 1) -> Path:
    """Writes a BERT without a head."""
    config = transformers.BertConfig(
        vocab_size=save_tokenizer(folder), hidden_size=32, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def save_decoder(folder: Path, **options: str) -> Path:
    """Writes a Llama of one layer."""
    config = transformers.LlamaConfig(
        vocab_size=save_tokenizer(folder, **options), hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=64, pad_token_id=0, bos_token_id=None,
        eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
