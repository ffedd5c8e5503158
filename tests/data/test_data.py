"""Data: what is read, what is refused, and how batches are padded."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from grape_ray.data.arrays import Ragged, Records
from grape_ray.data.columns import Table
from grape_ray.data.content import fingerprint
from grape_ray.data.sources import Source
from grape_ray.data.tables import read_table as read
from grape_ray.errors import ConfigError, DataError
from grape_ray.models.hugging_face import load_classifier
from grape_ray.tasks.text_classification import TextClassification

SST2 = Path(__file__).parents[3] / "shared" / "data" / "sst2"


@pytest.fixture
def read_table(tmp_path_factory):
    """The named columns of the records at a place, mapped from a folder of the test's own."""
    scratch = tmp_path_factory.mktemp("scratch")
    return lambda place, columns: read(Source(place), columns, scratch)


def write(path, text=("a", "b", "c"), label=(0, 1, 1), **more):
    table = pa.table({"text": list(text), "label": pa.array(list(label), pa.int8()), **more})
    pq.write_table(table, path)
    return str(path)


def test_a_file_a_folder_and_a_pattern_are_read(tmp_path, read_table):
    one, two = write(tmp_path / "a-1.parquet"), write(tmp_path / "a-2.parquet", ("d",), (0,))
    assert read_table(one, ["text"]).num_rows == 3
    assert read_table(str(tmp_path), ["text", "label"]).num_rows == 4
    table = read_table(f"{tmp_path}/a-*.parquet", ["text"])
    assert Table(table, "x").texts("text") == ["a", "b", "c", "d"]
    assert read_table(f"file://{two}", ["label"]).num_rows == 1


def test_what_lies_there_under_its_very_name_is_no_pattern(tmp_path, read_table):
    folder = tmp_path / "data[v1]?"
    folder.mkdir()
    star = write(folder / "a*.parquet")
    write(folder / "ab.parquet", ("d",), (0,))
    assert read_table(star, ["text"]).num_rows == 3
    assert read_table(str(folder), ["text"]).num_rows == 4
    assert read_table(f"{tmp_path}/data*/ab.parquet", ["text"]).num_rows == 1


def test_a_signed_address_is_read_as_it_is(tmp_path, read_table):
    """Signatures hold `*` and `?`; the server answers for the whole address alone."""
    content = Path(write(tmp_path / "x.parquet")).read_bytes()
    asked = []

    class Signed(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            found = self.path == "/x.parquet?sig=a*b%2F?c"
            self.send_response(200 if found else 403)
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.end_headers()
            if self.command == "GET" and found:
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Signed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}/x.parquet?sig="
        assert read_table(f"{place}a*b%2F?c", ["text"]).num_rows == 3
        with pytest.raises(DataError, match=r"not found|cannot be"):
            read_table(f"{place}a*b", ["text"])
        server.shutdown()
    assert asked


def test_a_url_of_the_hub_is_read_through_its_file_system(tmp_path, read_table, monkeypatch):
    class Hub(MemoryFileSystem):
        protocol, store, pseudo_dirs = "hf", {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix("hf://"))

    monkeypatch.setitem(_registry, "hf", Hub)
    for name in ("train-0", "train-1", "validation-0"):
        content = Path(write(tmp_path / f"{name}.parquet", label=(0, 1, 2))).read_bytes()
        fsspec.filesystem("hf").pipe_file(f"datasets/owner/name/sst2/{name}.parquet", content)
    assert read_table("hf://datasets/owner/name/sst2/train-*.parquet", ["text"]).num_rows == 6
    assert read_table("hf://datasets/owner/name/sst2/validation*", ["text"]).num_rows == 3
    with pytest.raises(
        DataError,
        match=r"several splits.*train-0.parquet.*validation-0.parquet.*name/sst2/train-\*.parquet",
    ):
        read_table("hf://datasets/owner/name/sst2", ["text"])
    with pytest.raises(DataError, match="not found"):
        read_table("hf://datasets/owner/name/test-*.parquet", ["text"])
    url = "hf://datasets/owner/name/sst2/train-*.parquet"
    monkeypatch.setattr(TextClassification, "reader", lambda self: "no tokenizer")
    with pytest.raises(DataError, match=r"another label in rows 2, 5', expected 0 to 1"):
        TextClassification("/no/model", url, url, classes=2).load()


def test_what_cannot_be_read_is_one_clear_error(tmp_path, read_table):
    good = write(tmp_path / "good.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet at all")
    (tmp_path / "cut.parquet").write_bytes(Path(good).read_bytes()[:-20])
    (tmp_path / "empty").mkdir()
    for url, message in [
        (str(tmp_path / "none.parquet"), "not found"),
        (str(tmp_path / "bad.parquet"), "cannot be read as Parquet"),
        (str(tmp_path / "cut.parquet"), "cannot be read as Parquet"),
        (str(tmp_path / "empty"), "not found"),
        ("nosuchscheme://x/y", "cannot be reached"),
        (write(tmp_path / "rows.parquet", (), ()), "no rows"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            read_table(url, ["text", "label"])
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"column missing.*did you mean 'text'"):
        read_table(good, ["txt"])


def test_labels_and_texts_are_checked():
    rows = {"text": ["a", "b", "c"], "label": pa.array([0, 1, 2], pa.int8()), "x": [0.5, 1, 2]}
    table = Table(pa.table({**rows, "name": ["no", "yes", "no"], "bool": [True, False, True]}), "x")
    assert table.labels("label", "012").tolist() == [0, 1, 2]
    assert table.labels("label", ("no", "yes", "perhaps")).tolist() == [0, 1, 2]
    assert table.label_names("name") == ("no", "yes")
    assert table.labels("name", ("yes", "no")).tolist() == [1, 0, 1]
    assert table.label_names("bool") == ("false", "true")
    assert Table(pa.table({"x": [10, 9, 10]}), "x").label_names("x") == ("9", "10")
    with pytest.raises(DataError, match=r"another label in row 2.*0 to 1"):
        table.labels("label", "01")
    with pytest.raises(DataError, match="expected strings"):
        table.texts("label")
    with pytest.raises(DataError, match=r"double.*whole numbers as integers"):
        table.label_names("x")
    with pytest.raises(DataError, match="30 different values in 30 rows"):
        Table(pa.table({"x": range(30)}), "x").label_names("x")


def test_rows_that_cannot_be_used_are_told_by_number_and_left_out_on_demand():
    holes = pa.table({"text": ["a", None, " \t", "b"], "label": pa.array([None, 1, 2, 0])})
    table = Table(holes, "x", row_numbers=range(100, 100 + len(holes)))
    bad = table.bad_rows(["text", "label"], ["text"])
    with pytest.raises(
        DataError, match=r"missing values of column 'label' in row 100.*empty.*in row 102"
    ):
        table.refuse(bad)
    assert table.without(np.logical_or.reduce(list(bad.values()))).texts("text") == ["b"]
    unlabelled = Table(pa.table({"label": pa.array([0, -1, None, 1])}), "x")
    bad = unlabelled.bad_rows([], [], ["label"])
    with pytest.raises(DataError, match="1 labels -1 \\(none\\) of column 'label' in row 1\""):
        unlabelled.refuse(bad)
    many = Table(pa.table({"text": [None] * 9}, schema=pa.schema([("text", pa.string())])), "x")
    with pytest.raises(DataError, match="rows 0, 1, 2, 3, 4 and 4 more"):
        many.refuse(many.bad_rows(["text"], []))


def test_the_fingerprint_depends_on_content_and_order_alone(tmp_path):
    whole = pa.table({"text": ["ab", "c", ""], "label": pa.array([0, 1, 1], pa.int8())})
    pieces = pa.concat_tables([whole.slice(0, 1), whole.slice(1)])
    assert (
        fingerprint(whole)
        == fingerprint(pieces)
        == fingerprint(whole.cast(pa.schema([("text", pa.large_string()), ("label", pa.int64())])))
    )
    others = [
        whole.take([1, 0, 2]),
        whole.slice(0, 2),
        pa.table({"text": ["a", "bc", ""], "label": pa.array([0, 1, 1], pa.int8())}),
    ]
    assert len({fingerprint(t) for t in [whole, *others]}) == 4


def test_the_fingerprint_of_floats_sees_their_fractions(tmp_path):
    tables = [
        pa.table({"x": pa.array(values, kind)})
        for kind in (pa.float32(), pa.float64())
        for values in ([0.25, 1.5], [0.75, 1.5])
    ]
    assert len({fingerprint(table) for table in tables}) == 4
    assert fingerprint(tables[0]) == fingerprint(
        pa.concat_tables([tables[0].slice(0, 1), tables[0].slice(1)])
    )
    integers = pa.table({"label": pa.array([0, 1, 1], pa.int8())})
    assert fingerprint(integers) == "d06a0919a754d79412671945fa8eda4f"  # ledgers are found by it
    nested = [[{"role": "a", "content": "b"}], []]
    pieces = pa.chunked_array([pa.array(nested[:1]), pa.array(nested[1:], pa.array(nested).type)])
    assert fingerprint(pa.table({"x": nested})) == fingerprint(pa.table({"x": pieces}))
    assert fingerprint(pa.table({"x": nested})) != fingerprint(pa.table({"x": nested[::-1]}))
    with pytest.raises(DataError, match="column 'x'"):
        fingerprint(pa.table({"x": pa.array([1, 2], pa.timestamp("s"))}))


def test_a_part_of_a_table_spends_from_the_whole_tables_budget(tmp_path, monkeypatch):
    url = write(tmp_path / "a.parquet")
    monkeypatch.setattr(TextClassification, "reader", lambda self: "no tokenizer")
    monkeypatch.setattr(TextClassification, "inputs", lambda self, table: {})
    tasks = [TextClassification("m", url, url, classes=2, limit=limit) for limit in (0, 2)]
    assert [len(task.load().train) for task in tasks] == [3, 2]
    assert tasks[0].load().dataset_id == tasks[1].load().dataset_id


def test_padding_reaches_the_longest_of_the_batch():
    ragged = Ragged.of([[1, 2, 3], [], [4], [5, 6]])
    values, mask = ragged.padded(np.array([3, 1, 2]), fill=9)
    assert values.tolist() == [[5, 6], [9, 9], [4, 9]]
    assert mask.tolist() == [[1, 1], [0, 0], [1, 0]]
    values, mask = ragged.padded(np.array([1]), fill=9)
    assert values.tolist() == [[9]]
    assert mask.sum() == 0


def test_records_order_by_length_and_refuse_a_ragged_table():
    records = Records({"ids": Ragged.of([[1, 2, 3], [1], [1, 2], [1]]), "y": np.arange(4)})
    assert records.by_length(np.array([0, 2, 3])).tolist() == [3, 2, 0]
    assert Records({"y": np.arange(4)}).by_length(np.array([3, 0])).tolist() == [3, 0]
    with pytest.raises(ValueError, match="different lengths"):
        Records({"a": np.arange(2), "b": np.arange(3)})


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere-at-all"])
def test_a_missing_model_folder_is_one_clear_error(name):
    with pytest.raises(ConfigError, match=r"task\.model.*config\.json"):
        load_classifier(name, 2, 0)


@pytest.mark.skipif(
    not SST2.is_dir(), reason="the SST-2 files are not beside the repository (../shared/data/sst2)"
)
def test_the_real_sst2_is_read_and_fingerprinted(read_table):
    url = str(SST2 / "validation.parquet")
    table = read_table(url, ["sentence", "label"])
    assert table.num_rows == 872
    assert set(Table(table, url).labels("label", "01").tolist()) == {0, 1}
    assert len(fingerprint(table)) == 32


def test_what_may_be_a_record_is_not_quoted(tmp_path, read_table):
    """A file without a header, whose first record stands where names are, and objects with a key
    for each person.
    """
    (tmp_path / "t.csv").write_text("Ann Lee of Elm Street is ill,1\nothers,0\n")
    (tmp_path / "t.jsonl").write_text('{"Ann Lee": 1}\n')
    for file in ("t.csv", "t.jsonl"):
        with pytest.raises(DataError, match="column missing") as raised:
            read_table(str(tmp_path / file), ["text"])
        assert "Ann Lee" not in str(raised.value)
    table = Table(pa.table({"text": [{"Ann Lee": 1}], "many": [[{"Ann Lee": 1}]]}), "x")
    for column in ("text", "many"):
        with pytest.raises(DataError, match="struct") as raised:
            table.texts(column)
        assert "Ann Lee" not in str(raised.value)


@pytest.mark.parametrize("values", [["a", None], [True, None], [3, None], [0.5, None], [[1], None]])
def test_a_missing_value_is_content(values):
    first, second = (fingerprint(pa.table({"x": v})) for v in (values, values[::-1]))
    assert first != second
    filled = fingerprint(pa.table({"x": pa.array([values[0], values[0]])}))
    assert filled not in (first, second)
