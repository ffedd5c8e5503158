"""A prepared set at a URL may have been put there, or replaced, by anyone."""

import json
from pathlib import Path

import pytest

from grape_ray.data.prepared import VALIDATION, checked_tables, encode_validation
from grape_ray.data.record_files import RecordsWriter
from grape_ray.data.shards import encode_shard, open_sharded_set, write_index
from grape_ray.errors import DataError
from grape_ray.tasks.text_generation import TextGeneration


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def prepared(folder: Path, users: str, held_out: str):
    """A set of four texts in one shard; what it is opened with."""
    folder.mkdir()
    rows = [f"text {number},{user}\n" for number, user in enumerate(users)]
    (folder / "t.csv").write_text("text,user\n" + "".join(rows))
    (folder / "v.csv").write_text(f"text\n{held_out}\n")
    task = TextGeneration(
        "", str(folder / "t.csv"), validation=str(folder / "v.csv"), tokenizer="bytes"
    )
    split, identity, url = task.division("user"), task.encoding("user"), str(folder / "set")
    tables = checked_tables(split, task, folder)
    shards = [encode_shard(split, task, tables, 0, url)]
    writer = RecordsWriter(folder / VALIDATION)
    encode_validation(task, tables, writer)
    writer.finish()
    write_index(url, split, tables, identity, shards, folder / VALIDATION)
    return url, identity


def test_a_set_of_the_same_texts_has_its_own_units_and_validation_records(tmp_path):
    """What one machine keeps of a set is not taken for another, or for one that took its place."""
    one = open_sharded_set(*prepared(tmp_path / "one", "aabb", "first"))
    two = open_sharded_set(*prepared(tmp_path / "two", "abab", "second"))
    units = [[s.units.records_of(u).tolist() for u in range(2)] for s in (one, two)]
    assert units[0] != units[1]
    modes = [file.stat().st_mode & 0o777 for file in (tmp_path / "one" / "set").iterdir()]
    assert set(modes) == {0o600}  # they hold what the records say
    lengths = [len(s.validation.sequences("input_ids")[0]) for s in (one, two)]
    assert lengths[1] - lengths[0] == len("second") - len("first")


def test_a_strangers_index_writes_no_file_of_its_choice(tmp_path):
    url, identity = prepared(tmp_path / "one", "aabb", "first")
    index = json.loads(Path(url, "index.json").read_text())
    for name in ("../../../stolen", "/stolen", "train-00000.arrow/../../stolen", "train-1.arrow"):
        changed = {**index, "files": {**index["files"], name: "0" * 32}}
        Path(url, "index.json").write_text(json.dumps({**changed, "digest": "../.."}))
        with pytest.raises(DataError, match="damaged"):
            open_sharded_set(url, identity)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["arrays.npz", "validation.arrow", "train-00000.arrow"])
def test_files_that_were_exchanged_are_refused(name, tmp_path):
    url, identity = prepared(tmp_path / "one", "aabb", "first")
    Path(url, name).write_bytes(b"others")
    with pytest.raises(DataError, match=f"damaged.*other content in {name}"):
        open_sharded_set(url, identity).train.sequences("input_ids")[0]
