"""Data as people have it, wrong in one thing each: one line that says what, got, expected and fix,
without a record's content; nothing is kept.
"""

import json

import datasets
import pyarrow as pa
import pytest

from grape_ray.data import cache
from grape_ray.errors import ConfigError, DataError
from grape_ray.tasks.text_classification import TextClassification
from grape_ray.tasks.text_generation import TextGeneration
from tests.support.word_model import save_decoder, save_encoder

SECRET = "mrs-dalloway-4711"
GOOD = "".join(f"t{n} wine,{'ab'[n % 2]}\n" for n in range(40))
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


def chat(*roles, content="wine"):
    return {"messages": [{"role": role, "content": content} for role in roles]}


CSV = {
    "another file": ("none.csv", None, {}, "data not found"),
    "no name": ("", None, {}, "no path"),
    "a folder without files": ("folder/", None, {}, "not found"),
    "empty": ("t.csv", "", {}, "it is empty"),
    "a header alone": ("t.csv", "text,label\n", {}, "no rows"),
    "a field too few": ("t.csv", f"text,label\n{SECRET}\n", {}, "row 0 has 1 fields, the header 2"),
    "a field too many": ("t.csv", f"text,label\n{GOOD}{SECRET},a,b\n", {}, "row 40 has 3 fields"),
    "latin 1": ("t.csv", f"text,label\n{SECRET} é,a\n".encode("latin-1"), {}, "UTF-8"),
    "no such column": ("t.csv", f"body,label\n{GOOD}", {}, "column missing.*'text'"),
    "a slip in a column": ("t.csv", f"texts,label\n{GOOD}", {}, "did you mean 'texts'"),
    "a column twice": ("t.csv", "text,text,label\na,b,c\n", {}, "2 columns of that name"),
    "an empty text": ("t.csv", f"text,label\n{GOOD},a\n", {}, "1 empty values .* row 40"),
    "blanks": ("t.csv", f"text,label\n{GOOD}  ,a\n", {}, "1 empty values .* row 40"),
    "an empty label": ("t.csv", f"text,label\n{GOOD}x,\n", {}, "empty values of column 'label'"),
    "labels that differ": (
        "t.csv",
        "text,label\n" + "".join(f"x,{SECRET}{n}\n" for n in range(50)),
        {},
        "50 different values in 50 rows",
    ),
    "one label": ("t.csv", "text,label\nx,a\ny,a\n", {}, "1 label.*at least two"),
    "decimals": ("t.csv", "text,label\nx,0.5\ny,1.5\n", {}, "double.*integers"),
    "undeclared": ("t.csv", f"text,label\n{GOOD}x,{SECRET}\n", {"labels": ("a", "b")}, "row 40"),
    "declared as integers": ("t.csv", f"text,label\n{GOOD}", {"classes": 2}, "task.classes=0"),
    "out of range": ("t.csv", "text,label\nx,0\ny,7\n", {"classes": 2}, "row 1.*0 to 1"),
    "a text among numbers": (
        "t.csv",
        "text,label\n" + "x,1\n" * 3 + f"y,{SECRET}\n",
        {"label_column": "label"},
        ".",
    ),
    "broken JSON": (
        "t.jsonl",
        lines({"text": "x", "label": "a"}) + f'\n{{"text": "{SECRET}',
        {},
        "JSON",
    ),
    "an array of texts": ("t.json", json.dumps([SECRET]), {}, "JSON Lines.*objects"),
    "a null": (
        "t.jsonl",
        lines(*[{"text": "x", "label": "a"}] * 9, {"text": None, "label": "b"}),
        {},
        "row 9",
    ),
    "a number as text": ("t.jsonl", lines({"text": 7, "label": "a"}), {}, "int64.*strings"),
    "types that change": (
        "t.jsonl",
        lines({"text": "x", "label": 1}, {"text": "y", "label": SECRET}),
        {},
        "row 1",
    ),
    "no Parquet": ("t.parquet", f"text,label\n{GOOD}", {}, "cannot be read as Parquet"),
    "an unknown format": (
        "t.csv",
        f"text,label\n{GOOD}",
        {"data_format": "cvs"},
        "did you mean 'csv'",
    ),
    "all held out": (
        "t.csv",
        "text,label\nx,a\ny,b\n",
        {"held_out": 0.9999},
        "train.*at least one",
    ),
    "a hub dataset": ("nobody/nothing-here", None, {}, "data not found.*hub"),
}
CHATS = {
    "no template": (
        "t.jsonl",
        lines(chat("user", "assistant")),
        {"model": "plain"},
        "chat template",
    ),
    "no assistant": ("t.jsonl", lines(chat("user", content=SECRET)), {}, "chat .* row 0"),
    "another role": (
        "t.jsonl",
        lines(chat("user", "bot", content=SECRET)),
        {},
        "messages .* row 0",
    ),
    "no messages": (
        "t.jsonl",
        lines(chat("user", "assistant"), {"messages": []}),
        {},
        "empty .* row 1",
    ),
    "texts": ("t.jsonl", lines({"messages": SECRET}), {}, "lists of messages"),
    "too long": ("t.jsonl", lines(chat("user", "assistant")), {"max_tokens": 2}, "max_tokens = 2"),
    "two columns": (
        "t.jsonl",
        lines(chat("user", "assistant")),
        {"prompt_column": "x"},
        "unset one",
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_encoder(root / "encoder")
    save_decoder(root / "plain")
    save_decoder(root / "chat", chat_template=TEMPLATE)
    return root


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Where prepared sets of this test alone would lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: [p for p in cache.cache_folder().glob("*") if p.suffix != ".lock"]


def refused(load, kept, part):
    with pytest.raises((DataError, ConfigError), match=part) as caught:
        load()
    said = str(caught.value)
    assert SECRET not in said
    assert "\n" not in said
    assert ";" in said  # something to do
    assert kept() == []


def place(tmp_path, name, content):
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name if not name or name.startswith("nobody/") else str(tmp_path / name)


@pytest.mark.parametrize("name", CSV)
def test_a_classifier_refuses(models, tmp_path, kept, name):
    file, content, fields, part = CSV[name]
    own = {"model": str(models / "encoder"), "held_out": 0.3, "public": False, **fields}
    refused(
        lambda: TextClassification(data=place(tmp_path, file, content), **own).load(), kept, part
    )


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_refuses(models, tmp_path, kept, name):
    file, content, fields, part = CHATS[name]
    own = {"messages_column": "messages", "held_out": 0.3, **fields}
    own["model"] = str(models / own.get("model", "chat"))
    own["data"] = place(tmp_path, file, content)
    refused(lambda: TextGeneration(**own).load(), kept, part)


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (lambda d, f: d.to_csv(f / "t.tsv", sep="\t", index=False), "t.tsv"),
        (lambda d, f: d.to_pandas().to_csv(f / "t.csv.gz", index=False), "t.csv.gz"),
        (lambda d, f: d.to_json(f / "t.json"), "t.json"),
        (lambda d, f: d.to_parquet(f / "t.parquet"), "t.parquet"),
        (lambda d, f: d.save_to_disk(f / "saved"), "saved"),
        (lambda d, f: datasets.DatasetDict({"train": d, "x": d}).save_to_disk(f / "both"), "both"),
    ],
)
def test_every_format_is_one_dataset(models, tmp_path, save, name):
    """The same rows have one identity, so one ledger, in whatever file they come."""
    rows = {"text": [f"wine {n}, rain" for n in range(30)], "label": ["a", "b", "a"] * 10}
    save(datasets.Dataset.from_dict(rows), tmp_path)
    (tmp_path / "t.csv").write_text(
        "text,label\n" + "".join(f'"{t}",{label}\n' for t, label in zip(*rows.values()))
    )
    own = {"model": str(models / "encoder"), "held_out": 0.3}
    csv = TextClassification(data=str(tmp_path / "t.csv"), **own).load()
    other = TextClassification(data=str(tmp_path / name), **own).load()
    assert other.dataset_id == csv.dataset_id
    assert other.train.digests.whole == csv.train.digests.whole


def test_a_text_file_has_a_line_a_record(models, tmp_path):
    (tmp_path / "t.txt").write_text("wine rain\nsalt\n\nmilk\n" * 9)
    with pytest.raises(DataError, match="9 empty values of column 'text' in rows 2, 6"):
        TextClassification(
            str(models / "encoder"), str(tmp_path / "t.txt"), held_out=0.3, label_column="text"
        ).load()
    data = TextGeneration(str(models / "plain"), str(tmp_path / "t.txt"), held_out=0.3).load()
    assert len(data.train) + len(data.validation) == 36


def test_what_the_assistant_says_is_learned_and_nothing_else(models, tmp_path):
    told = [("user", "wine"), ("assistant", "rain salt"), ("user", "tree"), ("assistant", "milk")]
    (tmp_path / "t.jsonl").write_text(
        lines(
            *(
                {
                    "messages": [
                        {"role": r, "content": c + " corn" * n * (r == "user")} for r, c in told
                    ]
                }
                for n in range(12)
            )
        )
    )
    task = TextGeneration(
        str(models / "chat"), str(tmp_path / "t.jsonl"), held_out=0.3, messages_column="messages"
    )
    data = task.load()
    records = data.train
    ids, learned = records.sequences("input_ids")[0], records.sequences("learned")[0]
    words = task.load_tokenizer().convert_ids_to_tokens(ids[learned == 1].tolist())
    assert words == ["rain", "salt", "milk"]
    model = task.build_model(0)
    (tmp_path / "new.jsonl").write_text(lines(chat("user"), chat("user", "assistant", content="x")))
    from grape_ray.data.columns import Table
    from grape_ray.data.sources import Source
    from grape_ray.data.tables import read_table

    table = Table(read_table(Source(str(tmp_path / "new.jsonl")), ["messages"], tmp_path), "new")
    inputs = task.inputs(table)["input_ids"]
    assert inputs.lengths(pa.array([0, 1]).to_numpy()).tolist() == [3, 3]
    assert model.config.vocab_size == 12  # pyright: ignore[reportAttributeAccessIssue]
