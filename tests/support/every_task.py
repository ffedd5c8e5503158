"""One small case of each task that comes with the package: generated records, a tiny model with
random weights in a folder, and what a run file says of them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from tests.support.tasks import SPECIAL, TOKENS, WORDS, save_tokenizer

RECORDS = 96
_CHAT = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
_SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIZE |= {"intermediate_size": 32}
_END, _PAD = SPECIAL.index("[END]"), SPECIAL.index("[PAD]")


@dataclass(frozen=True)
class Case:
    """A task, end to end.

    Attributes:
        model: name of a model of `save_models`. records: writes training records below a folder
            and returns their place. fields: of the task. auto: the class of transformers that
            loads the export, less its `AutoModelFor`. answers: the columns that `predict` gives.
        metrics: some that a run tells.
    """

    model: str
    records: Callable[[Path], Path]
    auto: str
    answers: tuple[str, ...]
    metrics: tuple[str, ...]
    fields: dict[str, Any] = field(default_factory=dict)


def save_models(root: Path) -> None:
    """Writes `bert`, `llama`, `t5` and `vit`."""
    torch.manual_seed(0)
    ids = {"vocab_size": TOKENS, "pad_token_id": _PAD}
    bert = transformers.BertConfig(**_SIZE, **ids, max_position_embeddings=48)
    transformers.BertForMaskedLM(bert).save_pretrained(root / "bert")
    llama = transformers.LlamaConfig(**_SIZE, **ids, bos_token_id=None, eos_token_id=_END)
    transformers.LlamaForCausalLM(llama).save_pretrained(root / "llama")
    t5 = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, eos_token_id=_END,
        decoder_start_token_id=_PAD,  # pyright: ignore[reportCallIssue]
        **ids,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(t5).save_pretrained(root / "t5")
    for name in ("bert", "llama", "t5"):
        save_tokenizer(root / name, end=name == "t5")
    told = transformers.AutoTokenizer.from_pretrained(root / "llama")
    told.chat_template = _CHAT
    told.save_pretrained(root / "llama")
    vit = transformers.ViTConfig(**_SIZE, image_size=8, patch_size=4)
    transformers.ViTModel(vit).save_pretrained(root / "vit")
    size = {"height": 8, "width": 8}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(root / "vit")


def _words(number: int) -> list[str]:
    rng = np.random.default_rng(number)
    return rng.choice(WORDS, size=int(rng.integers(1, 7))).tolist()


def _texts(number: int) -> str:
    return " ".join(_words(number))


def _written(row: Callable[[int], dict[str, Any]]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        place = folder / "records.jsonl"
        place.write_text("".join(json.dumps(row(n)) + "\n" for n in range(RECORDS)))
        return place

    return write


def _csv(folder: Path) -> Path:
    place = folder / "tickets.csv"
    with place.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["body", "topic"])
        rows.writerows([_texts(n), ("billing", "no")[n % 2]] for n in range(RECORDS))
    return place


def _images(folder: Path) -> Path:
    place, rng = folder / "images", np.random.default_rng(0)
    for number in range(RECORDS):
        file = place / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (9, 12, 3)).astype(np.uint8)).save(file)
    return place


def _chat(number: int) -> dict[str, Any]:
    said: Sequence[tuple[str, str]] = [("user", _texts(number)), ("assistant", _texts(number + 1))]
    return {"messages": [{"role": role, "content": text} for role, text in said]}


_CLASSES = ("label", "probabilities")
CASES = {
    "text-classification": Case(
        "bert", _csv, "SequenceClassification", _CLASSES, ("accuracy", "f1"),
        {"text_column": "body", "label_column": "topic"},
    ),
    "regression": Case(
        "bert", _written(lambda n: {"text": _texts(n), "score": len(_words(n)) / 7}),
        "SequenceClassification", ("number",), ("mse", "mae"),
    ),
    "token-classification": Case(
        "bert",
        _written(lambda n: {"tokens": _words(n), "tags": ["B-A" if w in WORDS[:5] else "O"
                                                          for w in _words(n)]}),
        "TokenClassification", ("tags",), ("f1", "accuracy"),
    ),
    "prompt-classification": Case(
        "bert", _written(lambda n: {"text": _texts(n), "label": ["bad", "good"][n % 2]}),
        "MaskedLM", _CLASSES, ("accuracy",),
        {"template": "{text} rain {mask} tree", "label_words": ["salt", "milk"],
         "labels": ["bad", "good"]},
    ),
    "text-generation": Case(
        "llama", _written(_chat), "CausalLM", ("text",), ("perplexity",),
        {"messages_column": "messages", "max_new_tokens": 4},
    ),
    "seq2seq": Case(
        "t5", _written(lambda n: {"source": _texts(n), "target": _texts(n)[::-1]}),
        "Seq2SeqLM", ("text",), ("bleu", "rouge_l"), {"max_new_tokens": 4},
    ),
    "preference": Case(
        "llama",
        _written(lambda n: {"prompt": _texts(n), "chosen": WORDS[n % 5], "rejected": "corn"}),
        "CausalLM", ("text",), ("margin",), {"max_new_tokens": 4},
    ),
    "image-classification": Case("vit", _images, "ImageClassification", _CLASSES, ("accuracy",)),
}  # fmt: skip
