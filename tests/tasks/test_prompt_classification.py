"""Prompts: label words in the mask's place, scored by masked and causal language models."""

import json
import warnings
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from grape_ray.data.arrays import Records
from grape_ray.data.columns import Table
from grape_ray.errors import Caution, ConfigError, DataError
from grape_ray.models.adapters import Lora
from grape_ray.tasks.prompt_classification import PromptClassification
from tests.support.tasks import SPECIAL, TOKENS, WORDS, save_tokenizer, trained

IDS = {word: len(SPECIAL) + place for place, word in enumerate(WORDS)}
MASK = SPECIAL.index("[MASK]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny language models with random weights, and texts with two labels."""
    root, rng = tmp_path_factory.mktemp("prompts"), np.random.default_rng(0)
    size = {"vocab_size": TOKENS, "hidden_size": 16, "num_attention_heads": 2, "pad_token_id": 0}
    size |= {"num_hidden_layers": 1, "max_position_embeddings": 48}
    torch.manual_seed(0)
    bert = transformers.BertConfig(**size, intermediate_size=32)
    transformers.BertForMaskedLM(bert).save_pretrained(root / "bert")
    llama = transformers.LlamaConfig(**size, intermediate_size=32)
    transformers.LlamaForCausalLM(llama).save_pretrained(root / "llama")
    opt = transformers.OPTConfig(**size, ffn_dim=32, word_embed_proj_dim=16)
    transformers.OPTForCausalLM(opt).save_pretrained(root / "opt")
    for name in ("bert", "llama", "opt"):
        save_tokenizer(root / name)
    rows = []
    for number in range(90):
        text = " ".join(rng.choice(WORDS, size=int(rng.integers(1, 9))))
        kind = ["bad", "good"][number % 2]
        rows.append({"text": text, "other": WORDS[number % 5], "label": number % 2, "kind": kind})
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def task(folder, model="bert", **fields):
    template = "{text} rain {mask} tree" if model == "bert" else "{text} rain {mask}"
    own = {"template": template, "label_words": ("salt", "milk"), "max_tokens": 9, "public": True}
    own |= {"model": str(folder / model), "data": str(folder / "texts.jsonl"), "held_out": 0.3}
    return PromptClassification(**{**own, **fields})


@pytest.mark.parametrize(
    ("model", "kind", "fields"),
    [
        ("bert", "MaskedLM", {}),
        (
            "bert",
            "MaskedLM",
            {"lora": Lora(rank=2), "label_column": "kind", "labels": ("bad", "good")},
        ),
        ("llama", "CausalLM", {}),
        ("opt", "CausalLM", {}),
    ],
)
def test_trains_is_exported_and_predicts(folder, tmp_path, model, kind, fields):
    one = task(folder, model, **fields)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the names of", Caution)
        result, out = trained(one, tmp_path)
    assert set(result.metrics) == {"accuracy", "f1", "loss"}
    again = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(out).eval()
    known = task(folder, model, **{**fields, "labels": ("bad", "good")})
    table = Table(pa.table({"text": ["wine", "fish corn glass"]}), "here")
    said = known.predict(again, Records(known.inputs(table)))
    for row, text in enumerate(["wine", "fish corn glass"]):
        ids = [*(IDS[word] for word in text.split()), IDS["rain"]]
        ids, place = ([*ids, MASK, IDS["tree"]], -2) if model == "bert" else (ids, -1)
        logits = again(input_ids=torch.tensor([ids])).logits[0, place]
        chances = logits[[IDS["salt"], IDS["milk"]]].softmax(-1)
        found = [said["probabilities"][row][name] for name in ("bad", "good")]
        torch.testing.assert_close(torch.tensor(found), chances, rtol=1e-4, atol=1e-6)


def test_texts_are_cut_and_the_template_is_not(folder):
    one = task(folder, template="{other} glass {text} rain {mask} tree")
    words = {"text": ["grape " * 20, "wine [MASK] wine"], "other": ["corn corn", "fish"]}
    found = one.inputs(Table(pa.table(words), "here"))
    spelled = [[*SPECIAL, *WORDS][token] for token in found["input_ids"][0]]
    assert spelled == ["corn", "corn", "glass", "grape", "grape", "grape", "rain", "[MASK]", "tree"]
    second = found["input_ids"][1].tolist()
    assert second.count(MASK) == 1
    assert [row[place] for row, place in zip(found["input_ids"], found["place"])] == [MASK, MASK]
    with pytest.raises(DataError, match=r"no room for a text in rows 0, 1'.*max_tokens = 3"):
        task(folder, max_tokens=3).inputs(Table(pa.table({"text": ["wine", "fish"]}), "here"))


def test_letters_of_several_tokens_are_cut_whole(tmp_path):
    """Bytes as tokens: each emoji is four of them, all of one letter of the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {letter: place for place, letter in enumerate([*SPECIAL, *alphabet])}
    bytewise = Tokenizer(models.BPE(letters, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytewise, pad_token="[PAD]", mask_token="[MASK]"
    ).save_pretrained(tmp_path)
    transformers.BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    one = PromptClassification(
        str(tmp_path), "x.csv", template="{text}:{mask}", label_words=("a", "b"), max_tokens=8
    )
    found = one.inputs(Table(pa.table({"text": ["🍇🍇🍇🍇", "ab🍇🍇"]}), "here"))
    assert [len(found["input_ids"][row]) for row in range(2)] == [6, 8]


def test_a_word_is_scored_once_and_not_at_each_position(folder):
    one = task(folder)
    records, net = one.load().train, cast(Any, one.build_model(0))
    seen = []
    hook = net.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(tuple(output.shape))
    )
    one.per_example_loss(net, one.collate(records, np.arange(6)))
    hook.remove()
    assert seen == [(6, 1, TOKENS)]


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"template": "{text} rain"}, r"task\.template"),
        ({"template": "rain {mask}"}, r"task\.template"),
        ({"template": "{text} {mask} {mask}"}, r"task\.template"),
        ({"template": "{text {mask}"}, r"task\.template"),
        ({"template": "{} {mask}"}, r"task\.template"),
        ({"label_words": ("salt",)}, r"task\.label_words"),
        ({"label_words": ("salt", "great")}, r"task\.label_words.*'great'.*one token"),
        ({"label_words": ("salt", "milk corn")}, r"task\.label_words.*one token"),
        ({"label_words": ("salt", "salt")}, r"task\.label_words.*of its own"),
        ({"labels": ("a", "b", "c")}, r"task\.label_words.*each of 3"),
        ({"multi_label": True}, r"task\.multi_label"),
        ({"model": "llama", "template": "{text} {mask} tree"}, r"nothing after \{mask\}"),
    ],
)
def test_templates_and_words_that_cannot_be_are_refused(folder, fields, part):
    def begin():
        one = task(folder, **fields)
        one.load()
        one.build_model(0)

    with pytest.raises(ConfigError, match=part):
        begin()


def test_labels_without_an_order_are_refused(folder):
    with pytest.raises(DataError, match=r"no numbers.*in the order of task\.label_words"):
        task(folder, label_column="kind").load()
