"""The accountant actor: killed at will, asked by many, fenced, and closed when its ledger is
away.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from grape_ray.accounting import Mechanism
from grape_ray.errors import BudgetExceeded, LedgerError, NoiseReuse
from grape_ray.ledger import Ledger, Study, verify
from grape_ray.ledger.lease import LEASE_FILE, Lease
from grape_ray.storage import Storage

STUDY = Study("s", Mechanism("poisson_gaussian", 1.0, 60.0), 4.0, 1e-6, 300)


@pytest.fixture
def url(tmp_path):
    Ledger.open(tmp_path / "ledger", "data", 8.0, 1e-5)
    return str(tmp_path / "ledger")


@pytest.fixture
def accountant(url, ray_cluster):
    from grape_ray.ray_backend.ledger_client import LedgerActorClient

    found = LedgerActorClient.start(url, beat_s=0.2)
    found.ensure_study(STUDY)
    yield found
    found.release()


def holder(url):
    """The process that holds a ledger."""
    return json.loads(Path(url, LEASE_FILE).read_text())["pid"]


@pytest.mark.ray
def test_it_stands_in_for_the_ledger(accountant, url):
    assert accountant.ledger_id == Ledger.open(url).ledger_id
    attempt = accountant.begin_attempt("s", "r", "id")
    assert accountant.charge("s", "r", attempt, 0, 10).steps == 10
    assert accountant.charge("s", "r", attempt, 0, 10).steps == 10  # a duplicate
    assert accountant.head == Ledger.open(url).head
    accountant.refund("s", "r", attempt, 0, 4)
    assert accountant.counts("s") == (STUDY, 6)
    assert accountant.attempts("s", "r")[0].used == 6
    assert accountant.epsilon_spent("s") == Ledger.open(url).epsilon_spent("s") > 0
    with pytest.raises(NoiseReuse, match="closed"):
        accountant.charge("s", "r", attempt, 1, 1)
    with pytest.raises(BudgetExceeded, match="costs too much"):
        accountant.ensure_study(Study("t", STUDY.mechanism, 4.5, 1e-6, 300))
    assert verify(url).ok


@pytest.mark.ray
def test_exactly_all_tokens_are_granted_while_it_is_killed_again_and_again(accountant, url):
    import ray

    @ray.remote(num_cpus=0.4)
    def trial(book, run):
        attempt, granted, chunk = book.begin_attempt("s", run, "id"), 0, 0
        while steps := book.charge("s", run, attempt, chunk, 3).steps:
            granted, chunk = granted + steps, chunk + 1
        return granted

    asked = [trial.remote(accountant, f"r{n}") for n in range(8)]
    killed, over = [], threading.Event()

    def kill():
        while not over.wait(0.4) and len(killed) < 3:
            pid = holder(url)
            if pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    granted = ray.get(asked, timeout=120)
    over.set()
    killer.join()
    assert killed
    assert sum(granted) == STUDY.tokens == Ledger.open(url).state.study("s").used
    assert verify(url).ok
    assert Ledger.open(url).state.epoch >= 1 + len(killed[:-1])


@pytest.mark.ray
def test_nothing_is_granted_while_the_ledger_is_away(accountant, url, tmp_path):
    attempt = accountant.begin_attempt("s", "r", "id")
    os.rename(url, tmp_path / "away")
    with pytest.raises(LedgerError):
        accountant.charge("s", "r", attempt, 0, 1)
    time.sleep(0.5)
    assert not Path(url).exists()
    os.rename(tmp_path / "away", url)
    assert accountant.charge("s", "r", attempt, 0, 1).steps == 1
    assert verify(url).ok


@pytest.mark.ray
@pytest.mark.slow
def test_metrics_show_what_is_left(accountant):
    import urllib.request

    import ray

    accountant.charge("s", "m", accountant.begin_attempt("s", "m", "id"), 0, 7)
    port = ray.nodes()[0]["MetricsExportPort"]
    deadline_s = time.monotonic() + 40
    while True:
        text = (
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        )
        lines = [line for line in text.splitlines() if line.startswith("ray_grape_study_")]
        if len({line.split("{")[0] for line in lines}) == 3:
            break
        assert time.monotonic() < deadline_s, lines
        time.sleep(1)
    assert all(
        f'ledger="{accountant.ledger_id}"' in line and 'dataset="' not in line for line in lines
    )
    values = {
        line.split("{")[0].removeprefix("ray_grape_study_"): float(line.rsplit(" ", 1)[1])
        for line in lines
        if 'study="s"' in line
    }
    assert values["steps_charged"] + values["tokens_left"] == STUDY.tokens
    assert 0 < values["epsilon_spent"] < 4


@pytest.mark.ray
def test_another_clusters_ledger_is_refused_while_that_cluster_lives(url, ray_cluster):
    from grape_ray.ray_backend.ledger_client import LedgerActorClient

    other = Lease(Storage(url), "another cluster", beat_s=0.2)
    other.take()
    with pytest.raises(LedgerError, match="another cluster holds the ledger"):
        LedgerActorClient.start(url, beat_s=0.2)
    other.release()
    assert not Path(url, LEASE_FILE).exists()
    mine = LedgerActorClient.start(url, beat_s=0.2)
    mine.ensure_study(STUDY)
    with pytest.raises(LedgerError, match=f"process {holder(url)} on"):
        Lease(Storage(url), "another cluster", beat_s=0.4).take()
    mine.release()


def test_the_claim_of_a_dead_cluster_is_taken_after_some_beats(url):
    Path(url, LEASE_FILE).write_text(
        json.dumps({"cluster": "dead", "pid": 1, "host": "gone", "beat": 7})
    )
    began = time.monotonic()
    lease = Lease(Storage(url), "mine", beat_s=0.1)
    lease.take()
    assert 0.3 < time.monotonic() - began < 5
    assert holder(url) == os.getpid()
    lease.release()
