"""No text of an exception that the task's code raised is printed or written: it may quote a
record.
"""

import json
import os
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest

from grape_ray.config.schema import Performance
from grape_ray.distributed.comms import Comms
from grape_ray.errors import DataError, GrapeRayError, LedgerError, TaskFailed
from grape_ray.privacy.redaction import run_redacted, text_of
from grape_ray.ray_backend.train import train
from grape_ray.training.loop import run_loop
from tests.support.quoting import PLACES, RECORD, Quoting
from tests.support.tiny import tiny
from tests.training.test_loop import Recorder

REPOSITORY = Path(__file__).parents[2]


def go(tmp_path, **task):
    config = replace(tiny(), task=Quoting(**task))
    return train(config, run="r", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))


def quoted(folder):
    return [
        path
        for path in Path(folder).rglob("*")
        if path.is_file() and RECORD.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("at", PLACES)
def test_nothing_quotes_a_record(at, tmp_path):
    with pytest.raises(TaskFailed) as caught:
        go(tmp_path, at=at)
    assert "support/quoting.py:" in str(caught.value)
    assert f"in {at}" in str(caught.value) or "_fail" in str(caught.value)
    error: BaseException | None = caught.value
    assert RECORD not in "".join(traceback.format_exception(error))
    while error is not None:  # nor what hangs on it
        assert RECORD not in repr(error.args)
        error = error.__cause__ or error.__context__
    assert quoted(tmp_path) == []


def test_the_journal_says_where_and_of_which_type(tmp_path):
    with pytest.raises(TaskFailed, match="failed with ValueError, got 'at support/quoting"):
        go(tmp_path)
    lines = next((tmp_path / "runs").rglob("attempt*.jsonl")).read_text().splitlines()
    failed = next(line for line in map(json.loads, lines) if line["event"] == "failed")
    assert (failed["error"], failed["reason"]) == ("ValueError", None)
    assert failed["where"][-1].startswith("support/quoting.py:")


def test_on_public_data_the_texts_are_shown(tmp_path):
    with pytest.raises(ValueError, match=RECORD):
        go(tmp_path, public=True)


def test_the_program_prints_no_text(tmp_path):
    code = "from grape_ray.cli.main import main; main()"
    words = [
        "train",
        "tests.support.quoting:quoting",
        "--storage",
        tmp_path / "runs",
        "--key-file",
        tmp_path / "key",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=REPOSITORY,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "the task failed with ValueError" in done.stderr
    assert RECORD not in done.stdout + done.stderr


def test_other_ranks_hear_of_rank_zeros_error_without_its_text():
    heard = []

    class First(Comms):
        def broadcast_object(self, value):
            heard.append(value)
            return value

    hooks = Recorder()

    def fail():
        raise ValueError(RECORD)

    hooks.evaluate = fail
    hooks.comms = First(0, 2)
    with pytest.raises(ValueError, match=RECORD):  # rank 0's own, which `execute` withholds
        run_loop(hooks.take, hooks, Performance(), 0, 0)
    assert isinstance(heard[-1][1], TaskFailed)
    assert RECORD not in str(heard[-1][1])


def test_our_own_errors_are_told_and_what_caused_them_is_not():
    from grape_ray.storage import Storage

    with pytest.raises(GrapeRayError, match="a name leaves its folder") as caught:
        run_redacted(lambda: Storage("/tmp").read("../x"), public=False)
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert text_of(LedgerError("away")) == "away"
    assert text_of(ValueError(RECORD)) == "ValueError"

    class Mine(DataError):
        pass

    assert text_of(Mine(RECORD)) == "Mine"
    with pytest.raises(KeyboardInterrupt):
        run_redacted(lambda: (_ for _ in ()).throw(KeyboardInterrupt()), public=False)


def test_a_label_that_cannot_be_is_not_told(tmp_path):
    import pyarrow as pa

    from grape_ray.data.columns import Table

    with pytest.raises(DataError, match="label in row 1") as caught:
        Table(pa.table({"label": [0, 7391, 1]}), "t").labels("label", "01")
    assert "7391" not in str(caught.value)
