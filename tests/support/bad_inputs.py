"""Model folders and tables that are wrong in one thing each, made on the spot with random
weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [f"w{i}" for i in range(90)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENS = len(WORDS) + len(SPECIAL)
_SIZES: dict[str, Any] = {
    "vocab_size": TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def tokenizer() -> Any:
    """One token a word."""
    made = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )  # pyright: ignore[reportAttributeAccessIssue]
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def bert(folder: Path, labels: int = 0, positions: int = 64, **sizes: Any) -> Path:
    """A tiny encoder with its tokenizer, and with a head for so many labels if any."""
    torch.manual_seed(0)
    config = hf.BertConfig(
        **{**_SIZES, **sizes}, intermediate_size=64, max_position_embeddings=positions
    )
    if labels:
        config.num_labels = labels
    (hf.BertForSequenceClassification(config) if labels else hf.BertModel(config)).save_pretrained(
        folder
    )
    tokenizer().save_pretrained(folder)
    return folder


def bare(folder: Path, family: str) -> None:
    """A model that was saved without its tokenizer, of a family for which transformers makes one
    up.
    """
    made = {
        "bert": lambda: hf.BertModel(hf.BertConfig(**_SIZES, intermediate_size=64)),
        "roberta": lambda: hf.RobertaModel(
            hf.RobertaConfig(**_SIZES, intermediate_size=64, max_position_embeddings=66)
        ),
        "opt": lambda: hf.OPTForCausalLM(
            hf.OPTConfig(**_SIZES, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32)
        ),
        "qwen2": lambda: hf.Qwen2ForCausalLM(
            hf.Qwen2Config(**_SIZES, num_key_value_heads=2, intermediate_size=64)
        ),
    }
    made[family]().save_pretrained(folder)


def gpt2(folder: Path) -> Path:
    """A tiny decoder with its tokenizer."""
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=TOKENS,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=2,
        eos_token_id=3,
    )
    hf.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def make_models(root: Path) -> None:
    """All model folders, below `root`."""
    good = bert(root / "good")
    gpt2(root / "gpt2")
    bert(root / "head3", labels=3)
    bert(root / "fewrows", vocab_size=80)
    bert(root / "short", positions=16)
    for family in ("bert", "roberta", "opt", "qwen2"):
        bare(root / f"notok-{family}", family)

    def variant(name: str, change: Callable[[Path], Any]) -> None:
        shutil.copytree(good, root / name)
        change(root / name)

    def config(**fields: Any) -> Callable[[Path], Any]:
        return lambda folder: _edit(folder / "config.json", fields)

    def weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
        return lambda folder: _change(folder / "model.safetensors", change)

    variant("truncated", lambda folder: _cut(folder / "model.safetensors", 5000))
    variant(
        "pointer",
        lambda folder: (folder / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\n"
        ),
    )
    variant("noweights", lambda folder: (folder / "model.safetensors").unlink())
    variant(
        "missing", weights(lambda found: found.pop("encoder.layer.0.attention.self.query.weight"))
    )
    variant(
        "othernames",
        weights(
            lambda found: [found.__setitem__(f"body.{key}", found.pop(key)) for key in list(found)]
        ),
    )
    variant(
        "nan", weights(lambda found: found["encoder.layer.0.output.dense.bias"].fill_(float("nan")))
    )
    variant("mismatched", config(intermediate_size=48))
    variant("oddtype", config(model_type="brandnew"))
    variant("vision", config(model_type="vit"))
    variant("tornconfig", lambda folder: _cut(folder / "config.json", 40))
    variant("listconfig", lambda folder: (folder / "config.json").write_text("[1]"))
    variant("noconfig", lambda folder: (folder / "config.json").unlink())
    variant("torntokenizer", lambda folder: _cut(folder / "tokenizer.json", 100))
    (root / "file").write_bytes(b"weights")


def _edit(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _change(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = load_file(path)
    change(found)
    save_file(found, path, {"format": "pt"})


def rows(count: int, seed: int = 0, length: int = 8) -> dict[str, Any]:
    """Texts whose words tell their label."""
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, 2, count)
    texts = [
        " ".join(f"w{(label * 40 + k) % 90}" for k in chance.integers(0, 40, length))
        for label in labels
    ]
    return {"text": texts, "label": labels.astype("int64")}


def make_tables(root: Path) -> None:
    """All tables, below `root`; `good` and `validation` are right."""
    good, many = rows(60), 60
    text, label = good["text"], good["label"]
    bad = pa.Array.from_buffers(
        pa.string(),
        1,
        [None, pa.py_buffer(np.array([0, 2], dtype=np.int32)), pa.py_buffer(b"\xff\xfe")],
    )
    tables: dict[str, Any] = {
        "good": good,
        "validation": rows(20, seed=1),
        "one": {"text": text[:1], "label": label[:1]},
        "norows": pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}),
        "nocolumns": pa.table({}),
        "lists": {"text": [[t] for t in text], "label": label},
        "structs": {"text": [{"a": t} for t in text], "label": label},
        "nullrow": {"text": [None, *text[1:]], "label": label},
        "nulls": {"text": pa.nulls(many), "label": label},
        "nulllabel": {"text": text, "label": [None, *label[1:].tolist()]},
        "textlabel": {"text": text, "label": [str(x) for x in label]},
        "floatlabel": {"text": text, "label": label.astype("f8")},
        "boollabel": {"text": text, "label": label.astype(bool)},
        "hugelabel": {"text": text, "label": np.full(many, 2**63 + 5, dtype=np.uint64)},
        "neglabel": {"text": text, "label": label - 1},
        "numbers": {"text": label, "label": label},
        "bytes": {"text": [t.encode() for t in text], "label": label},
        "notutf8": {"text": pa.concat_arrays([bad] * many), "label": label},
        "othernames": {"sentence": text, "target": label},
        "listlabel": {"text": text, "label": [[int(x)] for x in label]},
        "decimals": {"text": text, "label": pa.array(label).cast(pa.decimal128(20))},
        "twice": pa.Table.from_arrays(
            [pa.array(text), pa.array(text), pa.array(label)], names=["text", "text", "label"]
        ),
        "long": {"text": [*text[1:], " ".join(["w1"] * 50)], "label": label},
    }
    root.mkdir()
    for name, table in tables.items():
        pq.write_table(
            table if isinstance(table, pa.Table) else pa.table(table), root / f"{name}.parquet"
        )
    whole = (root / "good.parquet").read_bytes()
    for name, content in {
        "torn": whole[:-20],
        "holed": whole[:60] + bytes(200) + whole[260:],
        "empty": b"",
        "csv": b"text,label\na,1\n",
    }.items():
        (root / f"{name}.parquet").write_bytes(content)
    (root / "nothing").mkdir()
    for folder, files in {
        "splits": ("train-00000-of-00001", "validation-00000-of-00001"),
        "nested": ("train/data", "test/data"),
    }.items():
        for name in files:
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (root / folder / f"{name}.parquet").write_bytes(whole)
    (root / "mixed").mkdir()
    for name in ("good", "textlabel"):
        shutil.copy(root / f"{name}.parquet", root / "mixed")


def make_pipelines(root: Path) -> None:
    """Files that should hold a pipeline."""
    root.mkdir()
    config = "from tests.support.tiny import tiny\ndef {0}():\n    return tiny()\n"
    sources = {
        "syntax": "def config(:\n",
        "raises": "1 / 0\n",
        "needs": "import nosuchlibrary\n",
        "nothing": "x = 1\n",
        "fails": "def config():\n    return {}['a']\n",
        "wants": "def config(size):\n    return size\n",
        "other": "def config():\n    return 3\n",
        "json": config.format("config"),
        "named": config.format("confg"),
        "exits": "raise SystemError('no')\n",
        "taskless": "from grape_ray import Config\ndef config():\n    return Config(None)\n",
        "loads": (
            "from dataclasses import dataclass, replace\nfrom tests.support.tiny import Tiny,"
            " tiny\n@dataclass(frozen=True)\nclass T(Tiny):\n    def load(self):\n        return"
            " [1], [2]\ndef config():\n    return replace(tiny(), task=T())\n"
        ),
        "space_fails": "def space():\n    return {}['a']\ndef study():\n    pass\n",
        "space_slips": (
            "from ray import tune\nfrom tests.support.tiny import tiny\n"
            "from grape_ray.tuning import SweepStudy\n"
            "def space():\n    return {'method.rnk': tune.choice([1])}\ndef study():\n"
            "    return SweepStudy(tiny(), ('method.rnk',), 'public')\n"
        ),
    }
    for name, source in sources.items():
        (root / f"{name}.py").write_text(source)
    (root / "notes.txt").write_text("no program\n")
