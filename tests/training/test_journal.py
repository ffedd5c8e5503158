"""The journal of an attempt: everything that happened, in lines of JSON, nothing private, and never
in the way of training.
"""

import json
import threading
import time
import uuid

import pytest

from grape_ray.distributed.comms import Comms
from grape_ray.errors import StorageError
from grape_ray.ray_backend.train import train
from grape_ray.storage import Storage
from grape_ray.training.journal import Journal
from grape_ray.training.progress import Progress
from grape_ray.training.run import execute
from tests.support.plans import planned
from tests.support.tiny import tiny


def lines(folder):
    return [
        json.loads(line)
        for file in sorted(folder.glob("logs/*.jsonl"))
        for line in file.read_text().splitlines()
    ]


def test_a_run_tells_what_happened_and_nothing_private(tmp_path):
    config = tiny(slow_s=0.02).override(["performance.eval_every=4"])
    train(config, run="r", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    events = lines(tmp_path / "runs" / "r")
    names = [e["event"] for e in events]
    assert (names[0], names[-1]) == ("begun", "ended")
    assert sum(e["steps"] for e in events if e["event"] == "charged") == 12
    assert [e["step"] for e in events if e["event"] == "checkpoint committed"][-1] == 12
    assert all(
        e["attempt"] == 1 and e["rank"] == 0 and e["time"].endswith("+00:00") for e in events
    )
    allowed = {
        "time", "event", "attempt", "rank", "host", "pid", "run", "step", "world_size", "method",
        "resumed_from", "first_step", "steps", "epsilon", "tokens_left", "occasion", "name",
        "seconds", "exhausted", "interrupted",
    }  # fmt: skip
    assert set().union(*events) <= allowed  # a new field: is it known without the data?


def test_a_failure_of_the_task_is_named_without_its_words(tmp_path, monkeypatch):
    from tests.support.tiny import Tiny

    def quote(self, model, batch):
        raise ValueError("the record of Jane Doe")

    plan = planned(tiny(), run="r", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    monkeypatch.setattr(Tiny, "per_example_loss", quote)
    with pytest.raises(ValueError, match="Jane"):
        execute(plan, Comms.local())
    failed = next(e for e in lines(tmp_path / "runs" / "r") if e["event"] == "failed")
    assert (failed["error"], failed["reason"]) == ("ValueError", None)
    assert not any(b"Jane" in f.read_bytes() for f in (tmp_path / "runs").rglob("*") if f.is_file())


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_long_journal_loses_no_line_and_has_parts_where_nothing_can_append(kind, tmp_path):
    place = Storage(tmp_path if kind == "local" else f"memory://{uuid.uuid4()}")
    journal = Journal(place, 3, 0, every_s=0.01)
    for index in range(2000):
        journal.note("event", index=index, padding="x" * 100)
        if index % 200 == 0:
            time.sleep(0.03)
    journal.close()
    files = place.list("logs/")
    assert (len(files) > 1) == (kind == "memory")
    assert files[0] == "logs/attempt-0003-rank-0-part-000.jsonl"
    kept = [json.loads(line) for name in files for line in place.read(name).splitlines()]
    assert [event["index"] for event in kept] == list(range(2000))


def test_progress_is_kept_and_storage_that_fails_stops_nothing(tmp_path, monkeypatch):
    place, failing = Storage(tmp_path), threading.Event()
    plain = place.write

    def write(name, data):
        if failing.is_set():
            raise StorageError("down")
        plain(name, data)

    monkeypatch.setattr(place, "write", write)
    journal = Journal(place, 1, 0, every_s=0.01)
    failing.set()
    journal.note("lost for now")
    journal.progress(Progress(3, 9), 0.5)
    time.sleep(0.1)
    failing.clear()
    journal.close()
    assert [e["event"] for e in lines(tmp_path)] == ["lost for now"]
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 3
