"""Tags of tokens: which word piece bears one, several ways to write them, entities' metrics."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from grape_ray.data.arrays import Records
from grape_ray.data.columns import Table
from grape_ray.errors import DataError
from grape_ray.models.adapters import Lora
from grape_ray.tasks.token_classification import TokenClassification
from tests.support.tasks import trained

TAGS = ("O", "B-PER", "I-PER")
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "gra", "##pe", "wine", "rain", "##s", "stone"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with word pieces, and texts whose tags are texts, or places of classes."""
    root, rng = tmp_path_factory.mktemp("tags"), np.random.default_rng(0)
    vocabulary = {piece: place for place, piece in enumerate(PIECES)}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(root / "bert")
    config = transformers.BertConfig(
        vocab_size=len(PIECES), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(root / "bert")
    rows = []
    for _ in range(90):
        size = int(rng.integers(1, 7))
        tokens = rng.choice(["grape", "wine", "rains", "stone"], size=size).tolist()
        rows.append({"tokens": tokens, "tags": [TAGS[int(t)] for t in rng.integers(0, 3, size)]})
    (root / "tags.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {"tokens": [r["tokens"] for r in rows]}
    places["tags"] = [[TAGS.index(tag) for tag in r["tags"]] for r in rows]
    numbers = [json.dumps(dict(zip(places, row))) + "\n" for row in zip(*places.values())]
    (root / "places.jsonl").write_text("".join(numbers))
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "tags": datasets.List(datasets.ClassLabel(names=list(TAGS))),
        }
    )
    datasets.Dataset.from_dict(places, features).save_to_disk(root / "saved")
    return root


def task(folder, name="tags.jsonl", **fields):
    own = {"model": str(folder / "bert"), "data": str(folder / name), "held_out": 0.3}
    return TokenClassification(**{**own, "public": True, **fields})


@pytest.mark.parametrize("fields", [{}, {"lora": Lora(rank=2)}])
def test_trains_is_exported_and_gives_a_tag_a_token(folder, tmp_path, fields):
    result, out = trained(task(folder, labels=TAGS, **fields), tmp_path)
    assert set(result.metrics) == {"precision", "recall", "f1", "accuracy", "loss"}
    again = transformers.AutoModelForTokenClassification.from_pretrained(out).eval()
    assert again.config.id2label == dict(enumerate(TAGS))
    known = task(folder, labels=TAGS, max_tokens=5)
    words = [["grape", "wine", "grape"], ["rain"], ["grape"]]
    table = Table(pa.table({"tokens": words}), "here")
    said = known.predict(again, Records(known.inputs(table)))["tags"]
    assert said[0][2] is None  # beyond max_tokens
    for row, place in ((0, [1, 3]), (1, [1]), (2, [1])):
        ids = {0: [2, 4, 5, 6, 3], 1: [2, 7, 3], 2: [2, 4, 5, 3]}[row]
        logits = again(input_ids=torch.tensor([ids])).logits[0]
        assert said[row][: len(place)] == [TAGS[int(logits[p].argmax())] for p in place]


def test_the_loss_is_the_mean_over_first_pieces(folder):
    one = task(folder, labels=TAGS)
    records, net = one.load().train, one.build_model(0)
    losses = one.per_example_loss(net, one.collate(records, np.arange(8)))
    for row in range(8):
        ids, tags = (records.sequences(name)[row].tolist() for name in ("input_ids", "labels"))
        marks = [tag for piece, tag in zip(ids, tags) if not PIECES[piece].startswith(("##", "["))]
        assert [tag for tag in tags if tag != -100] == marks
        wanted = net(input_ids=torch.tensor([ids]), labels=torch.tensor([tags])).loss
        torch.testing.assert_close(losses[row], wanted, rtol=1e-4, atol=1e-5)


def test_tags_are_texts_places_or_classes(folder):
    one = task(folder, labels=TAGS).load()
    by_place = task(folder, "places.jsonl", labels=TAGS).load()
    by_class = task(folder, "saved").load()
    assert by_class.facts["labels"] == list(TAGS)
    assert task(folder).load().facts["labels"] == sorted(TAGS)
    assert task(folder, "places.jsonl").load().facts["labels"] == ["0", "1", "2"]
    for other in (by_place, by_class):
        for part in ("input_ids", "labels"):
            mine, theirs = (d.train.sequences(part) for d in (one, other))
            assert np.array_equal(mine.values, theirs.values)


def test_a_tokenizer_that_looks_at_spaces_sees_one_before_each_token(tmp_path):
    transformers.RobertaTokenizer(
        vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "Ġ": 5, "a": 6, "b": 7},
        merges=[],
    ).save_pretrained(tmp_path)
    transformers.RobertaConfig(vocab_size=8).save_pretrained(tmp_path)
    one = TokenClassification(str(tmp_path), "nothing.jsonl")
    table = Table(pa.table({"tokens": [["ab", "b"]]}), "here")
    found = one.inputs(table)
    assert found["input_ids"][0].tolist() == [0, 5, 6, 7, 5, 7, 2]
    assert found["words"][0].tolist() == [-1, 0, -1, -1, 1, -1, -1]


def test_rows_that_cannot_be_are_refused(folder, tmp_path):
    good = {"tokens": ["rain", "wine"], "tags": ["O", "O"]}

    def refused(*rows, **fields):
        path = tmp_path / "bad.jsonl"
        path.write_text("".join(json.dumps({**good, **row}) + "\n" for row in ({}, *rows)))
        with pytest.raises(DataError) as caught:
            task(folder, data=str(path), labels=TAGS, **fields).load()
        return str(caught.value)

    assert "tags of another number than tokens in rows 1, 2'" in refused(
        {"tags": ["O"]}, {"tokens": ["a", "b", "c"]}
    )
    unknown = refused({}, {"tags": ["O", "B-SECRET"]})
    assert "another tag in row 2'" in unknown
    assert "SECRET" not in unknown
    assert "missing tokens or tags in row 1'" in refused({"tokens": ["rain", None]})
    assert "empty values of column 'tokens' in row 1" in refused({"tokens": [], "tags": []})
