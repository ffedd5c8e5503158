"""What pipelines have in common: questions answered in words, images from arrays, and balanced
draws.
"""

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from grape_ray.errors import DataError
from pipelines.parts import few_shots, tiny_data
from pipelines.parts.image_files import main
from pipelines.parts.reading import Reading, f1_of_words

MODEL = "scratch:gpt2?vocab_size=259&n_embd=16&n_layer=1&n_head=2&n_positions=64"


def reading(folder, rows, **fields):
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = str(folder / "q.jsonl")
    fields = {"max_tokens": 64, "max_new_tokens": 2, **fields}
    return Reading(model=MODEL, data=place, validation=place, tokenizer="bytes", **fields)


ROW = {
    "context": "Aromi serves French food.",
    "question": "Which?",
    "answers": {"text": ["French"]},
}


def test_the_first_answer_is_learned_and_a_long_prompt_loses_its_beginning(tmp_path):
    longer = {**ROW, "context": "x" * 99 + ROW["context"]}
    task = reading(tmp_path, [ROW, longer], max_tokens=40)
    records = task.load().train
    for row in range(2):
        ids, learned = (records.sequences(n)[row] for n in ("input_ids", "learned"))
        assert len(ids) == len(learned) <= 40
        assert ids[0] == 1  # the beginning stays
        assert task.texts_of([ids[learned > 0].tolist()]) == [" French"]
    assert task.texts_of([records.sequences("input_ids")[1].tolist()])[0].endswith("Answer: French")


def test_answers_are_scored_by_their_words_against_the_best(tmp_path, monkeypatch):
    rows = [{**ROW, "answers": {"text": ["nothing", "French food"]}}, ROW]
    task = reading(tmp_path, rows)
    monkeypatch.setattr(Reading, "written", lambda *_: ["the French", "Greek"])
    found = task.evaluate(task.build_model(0), task.load().validation)
    assert found["f1"] == pytest.approx((f1_of_words("French", "French food") + 0) / 2)
    assert found["perplexity"] > 1


def test_a_row_without_an_answer_is_refused_by_number(tmp_path):
    with pytest.raises(DataError, match="no answer in row 1"):
        reading(tmp_path, [ROW, {**ROW, "answers": {"text": []}}]).load()


def test_answers_that_are_plain_texts(tmp_path):
    rows = [{**ROW, "answers": "French"}]
    assert len(reading(tmp_path, rows, answers="answers").load().train) == 1


def test_tiny_records_are_written_once():
    first, _ = tiny_data.classified(["text"], "label", 2)
    written = Path(first).stat().st_mtime_ns
    assert tiny_data.classified(["text"], "label", 2)[0] == first
    assert Path(first).stat().st_mtime_ns == written
    lines = [json.loads(line) for line in Path(first).read_text().splitlines()]
    assert {line["label"] for line in lines} == {0, 1}


def test_arrays_of_images_become_tables(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 4, 4, 3)).astype(np.uint8)
    strips, idx = tmp_path / "strips", tmp_path / "idx"
    strips.mkdir()
    for part in range(2):
        rows = pixels[3 * part : 3 * part + 3].reshape(3, -1)
        Image.fromarray(rows).save(strips / f"batch_{part}.png")
    np.savez(strips / "labels.npz", train=np.arange(5), test=np.arange(1))
    idx.mkdir()
    for name, count in (("train", 3), ("t10k", 2)):
        grays = pixels[:count, :, :, 0]
        head = b"\0\0\x08\x03" + np.array([count, 4, 4], ">u4").tobytes()
        (idx / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + grays.tobytes()))
        head = b"\0\0\x08\x01" + np.array([count], ">u4").tobytes()
        (idx / f"{name}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(head + bytes(range(count)))
        )
    for folder, counts, last in ((strips, (5, 1), pixels[5]), (idx, (3, 2), pixels[1, :, :, 0])):
        main(str(folder), str(tmp_path / "out"))
        tables = [pq.read_table(tmp_path / "out" / f"{n}.parquet") for n in ("train", "validation")]
        assert tuple(map(len, tables)) == counts
        image = tables[1].column("image").to_pylist()[-1]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(image))), last)
    with pytest.raises(DataError, match="a folder of images"):
        main(str(tmp_path), str(tmp_path / "out"))


def test_a_draw_has_as_many_rows_of_each_label_and_repeats(tmp_path):
    rows = [f"text {number},{'ab'[number % 3 == 0]}" for number in range(30)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")

    def drawn(name, *options):
        place, out = str(tmp_path / "rows.csv"), str(tmp_path / name)
        few_shots.main([place, out, "--shots", "8", *options], standalone_mode=False)
        return pq.read_table(out).to_pylist()

    first = drawn("first.parquet")
    assert [row["label"] for row in first].count("a") == 8
    assert len(first) == 16
    assert len({row["text"] for row in first}) == 16
    numbers = [int(row["text"].split()[1]) for row in first]
    assert numbers == sorted(numbers)
    assert drawn("again.parquet") == first
    assert drawn("other.parquet", "--seed", "21") != first
    with pytest.raises(DataError, match=r"rows of a label.*10 of 'b'.*at least 11"):
        drawn("many.parquet", "--shots", "11")
