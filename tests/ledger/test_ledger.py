"""The ledger's promises: idempotent, fenced, never overdrawn, and closed when storage fails at any
moment.
"""

import json
import multiprocessing
import queue
import threading
import time

import pytest

from grape_ray.accounting import Mechanism
from grape_ray.errors import (
    BudgetExceeded,
    ConfigError,
    GrapeRayError,
    LedgerError,
    NoiseReuse,
    StorageError,
)
from grape_ray.ledger import Ledger, Study, verify
from grape_ray.ledger.state import State
from grape_ray.storage import Storage

TOKENS = 20
MECHANISM = Mechanism("poisson_gaussian", 1.0, 10.0)
STUDY = Study("s", MECHANISM, 4.0, 1e-6, TOKENS)


def fresh(url, study=STUDY):
    ledger = Ledger.open(url, "data", 8.0, 1e-5)
    ledger.ensure_study(study)
    return ledger


@pytest.fixture
def url(tmp_path):
    return str(tmp_path / "ledger")


class Faulty(Storage):
    """A storage whose nth creation fails, before or after it has happened."""

    def __init__(self, url, nth, after):
        super().__init__(url)
        self.left, self.after = nth, after

    def create(self, name, data, private=False):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise StorageError("injected fault before the write")
        super().create(name, data, private)
        if self.left == 0:
            raise StorageError("injected fault after the write")


def script(ledger):
    """A whole run's calls; returns the steps granted, with one retry of each call that failed."""

    def sure(call):
        try:
            return call()
        except LedgerError:
            return call()

    sure(lambda: ledger.ensure_study(STUDY))
    granted = []
    for _ in range(2):
        attempt = sure(lambda: ledger.begin_attempt("s", "r", "id"))
        for chunk in range(2):
            granted.append(sure(lambda a=attempt, c=chunk: ledger.charge("s", "r", a, c, 3)).steps)
    sure(lambda: ledger.refund("s", "r", attempt, 1, 2))
    return granted


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("nth", range(1, 10))
def test_a_fault_at_any_write_loses_no_charge_and_grants_none_twice(url, nth, after):
    def opened():
        return Ledger.open(storage, "data", 8.0, 1e-5)

    storage = Faulty(url, nth, after)
    try:
        ledger = opened()
    except LedgerError:
        ledger = opened()
    assert script(ledger) == [3, 3, 3, 3]
    state = Ledger.open(url).state
    assert state.study("s").used == 12 - 2
    assert verify(url).ok
    assert state.next_seq >= 9


@pytest.mark.parametrize("nth", range(1, 9))
def test_a_process_that_dies_at_a_write_is_followed_by_another(url, nth):
    def life():
        ledger = Ledger.open(Faulty(url, nth, nth % 2 == 0), "data", 8.0, 1e-5)
        ledger.ensure_study(STUDY)
        attempt = ledger.begin_attempt("s", "r", "id")
        for chunk in range(9):
            ledger.charge("s", "r", attempt, chunk, 1)

    with pytest.raises(LedgerError):
        life()
    successor = fresh(url)
    before = successor.state.study("s").used
    attempt = successor.begin_attempt("s", "r", "id")
    assert successor.charge("s", "r", attempt, 0, TOKENS).steps == TOKENS - before
    assert verify(url).ok


class Remote(Storage):
    """An object store that answers after a while; counts how many it is asked for at once."""

    def __init__(self, url):
        super().__init__(url)
        self.asked, self.busy, self.most, self.lock = 0, 0, 0, threading.Lock()

    def read(self, name, start=None, end=None):
        with self.lock:
            self.asked, self.busy = self.asked + 1, self.busy + 1
            self.most = max(self.most, self.busy)
        time.sleep(0.002)
        try:
            return super().read(name, start, end)
        finally:
            with self.lock:
                self.busy -= 1


def test_entries_of_an_object_store_are_read_several_at_once(tmp_path):
    place = f"memory://{tmp_path.name}"
    ledger = fresh(place, Study("s", Mechanism("poisson_gaussian", 1.0, 100.0), 4.0, 1e-6, 200))
    attempt = ledger.begin_attempt("s", "r", "id")
    for chunk in range(60):
        ledger.charge("s", "r", attempt, chunk, 1)
    for call in (
        lambda storage: Ledger.open(storage).state,
        lambda storage: verify(storage, ledger.head),
    ):
        storage = Remote(place)
        found = call(storage)
        assert 4 < storage.most <= 16
        assert storage.asked < 3 * 63
        assert found == ledger.state if isinstance(found, State) else found.ok
    storage, known = Remote(place), Ledger.open(place)
    known._chain.storage = storage
    known.charge("s", "r", attempt, 60, 1)
    assert storage.asked == 2  # the last entry, and the one that may follow it


class Busy(Storage):
    """A folder in which another process writes between two looks at it."""

    def __init__(self, url, work):
        super().__init__(url)
        self.work = work

    def list(self, prefix=""):
        work, self.work = self.work, lambda: None
        work()
        return super().list(prefix)


def test_entries_that_come_while_a_ledger_is_opened_are_no_gap(url):
    ledger = fresh(url)
    attempt = ledger.begin_attempt("s", "r", "id")

    def work():
        for chunk in range(3):
            ledger.charge("s", "r", attempt, chunk, 1)

    assert Ledger.open(Busy(url, work)).state.study("s").used == 3


def test_nothing_is_granted_when_storage_is_gone(url, tmp_path):
    ledger = fresh(url)
    attempt = ledger.begin_attempt("s", "r", "id")
    (tmp_path / "ledger").rename(tmp_path / "away")
    with pytest.raises(LedgerError, match="removed"):
        ledger.charge("s", "r", attempt, 0, 1)
    assert not (tmp_path / "ledger").exists()
    (tmp_path / "ledger").write_text("a file in the folder's place")
    with pytest.raises(LedgerError, match="cannot be reached"):
        ledger.charge("s", "r", attempt, 0, 1)


def test_a_ledger_rolled_back_under_a_process_is_noticed(url, tmp_path):
    ledger = fresh(url)
    attempt = ledger.begin_attempt("s", "r", "id")
    ledger.charge("s", "r", attempt, 0, 5)
    (tmp_path / "ledger" / "00000003.json").unlink()
    with pytest.raises(LedgerError, match="removed"):
        ledger.charge("s", "r", attempt, 1, 5)


def numbers(grant):
    return grant.chunk, grant.first_step, grant.steps


def test_a_duplicate_call_returns_the_first_grant_and_writes_nothing(url):
    ledger = fresh(url)
    attempt = ledger.begin_attempt("s", "r", "id")
    first = ledger.charge("s", "r", attempt, 0, 7)
    entries = ledger.state.next_seq
    again = Ledger.open(url)
    assert first == ledger.charge("s", "r", attempt, 0, 7)
    assert first == again.charge("s", "r", attempt, 0, 7, first_step=0)
    assert (first.study, first.run, first.attempt, first.mechanism) == (
        "s",
        "r",
        1,
        STUDY.mechanism,
    )
    assert numbers(first) == (0, 0, 7)
    ledger.ensure_study(STUDY)
    assert ledger.state.next_seq == entries
    for arguments in ((6,), (7, 1)):
        with pytest.raises(LedgerError, match="other arguments"):
            ledger.charge("s", "r", attempt, 0, *arguments)


def test_the_budget_ends_with_fewer_steps_and_then_none(url):
    ledger = fresh(url)
    attempt = ledger.begin_attempt("s", "r", "id")
    grants = [numbers(ledger.charge("s", "r", attempt, c, 8)) for c in range(4)]
    assert grants == [(0, 0, 8), (1, 8, 8), (2, 16, 4), (3, 20, 0)]
    entries = ledger.state.next_seq
    assert ledger.charge("s", "other", ledger.begin_attempt("s", "other", "id"), 0, 1).steps == 0
    assert ledger.state.next_seq == entries + 1
    assert ledger.state.study("s").left == 0
    assert 0 < ledger.epsilon_spent("s") <= 4.0


def test_a_newer_attempt_fences_the_older(url):
    old, new = fresh(url), Ledger.open(url)
    first = old.begin_attempt("s", "r", "id")
    old.charge("s", "r", first, 0, 2)
    second = new.begin_attempt("s", "r", "id")
    assert (first, second) == (1, 2)
    with pytest.raises(NoiseReuse, match="attempt 2 has begun"):
        old.charge("s", "r", first, 1, 2)
    with pytest.raises(NoiseReuse, match="attempt 2 has begun"):
        old.charge("s", "r", first, 0, 2)
    with pytest.raises(NoiseReuse):
        old.refund("s", "r", first, 0, 1)
    # Steps repeated after a crash are charged again, under the new attempt.
    assert numbers(new.charge("s", "r", second, 0, 2, first_step=0)) == (0, 0, 2)
    assert old.state.study("s").used == 4


def test_a_step_is_never_granted_twice_in_one_attempt(url):
    ledger = fresh(url)
    attempt = ledger.begin_attempt("s", "r", "id")
    ledger.charge("s", "r", attempt, 0, 5, first_step=10)
    with pytest.raises(NoiseReuse, match="twice"):
        ledger.charge("s", "r", attempt, 1, 5, first_step=14)
    assert ledger.charge("s", "r", attempt, 1, 5).first_step == 15
    ledger.charge("s", "r", attempt, 7, 1)
    with pytest.raises(LedgerError, match="grow"):
        ledger.charge("s", "r", attempt, 6, 1)


def test_a_refund_ends_the_attempt(url):
    ledger = fresh(url)
    attempt = ledger.begin_attempt("s", "r", "id")
    ledger.charge("s", "r", attempt, 0, 5)
    ledger.charge("s", "r", attempt, 1, 5)
    for chunk, steps in ((0, 1), (1, 6)):
        with pytest.raises(LedgerError):
            ledger.refund("s", "r", attempt, chunk, steps)
    ledger.refund("s", "r", attempt, 1, 3)
    ledger.refund("s", "r", attempt, 1, 3)
    assert ledger.state.study("s").used == 7
    with pytest.raises(NoiseReuse, match="closed"):
        ledger.charge("s", "r", attempt, 2, 1)
    with pytest.raises(NoiseReuse):
        ledger.refund("s", "r", attempt, 1, 2)
    # what was given back is no grant any more, however the charge is repeated
    for chunk in (0, 1):
        with pytest.raises(NoiseReuse, match="closed"):
            ledger.charge("s", "r", attempt, chunk, 5)


def test_a_closed_attempt_stays_closed(url):
    ledger = fresh(url)
    attempt = ledger.begin_attempt("s", "r", "id")
    ledger.close_attempt("s", "r", attempt)
    ledger.close_attempt("s", "r", attempt)
    with pytest.raises(NoiseReuse, match="closed"):
        ledger.charge("s", "r", attempt, 0, 1)
    assert ledger.begin_attempt("s", "r", "id") == 2


def test_studies_share_the_budget_of_the_dataset(url):
    ledger = fresh(url)
    entries = ledger.state.next_seq
    with pytest.raises(BudgetExceeded, match="epsilon"):
        ledger.ensure_study(Study("t", MECHANISM, 4.01, 1e-6, 1))
    with pytest.raises(BudgetExceeded, match="delta"):
        ledger.ensure_study(Study("t", MECHANISM, 1.0, 9.1e-6, 1))
    with pytest.raises(BudgetExceeded, match="does not buy"):
        ledger.ensure_study(Study("t", MECHANISM, 4.0, 1e-6, 10_000))
    with pytest.raises(LedgerError, match="differently"):
        ledger.ensure_study(Study("s", MECHANISM, 4.0, 1e-6, TOKENS - 1))
    assert ledger.state.next_seq == entries
    ledger.ensure_study(Study("t", MECHANISM, 4.0, 9e-6, TOKENS))


def test_a_raised_budget_pays_for_further_studies(url):
    ledger, other = fresh(url), Ledger.open(url)
    study = Study("t", MECHANISM, 5.0, 1e-6, 1)
    with pytest.raises(BudgetExceeded):
        other.ensure_study(study)
    for _ in range(2):
        ledger.extend(9.0, None, "the board said so")
    assert ledger.state.next_seq == 3
    for arguments, error in (((8.5, None, "x"), LedgerError), ((None, 9e-6, "x"), LedgerError),
    ((9.0, None, "x"), LedgerError),
                             ((10.0, None, ""), ConfigError),
                             ((float("nan"), None, "x"), ConfigError)):  # fmt: skip
        with pytest.raises(error):
            ledger.extend(*arguments)
    other.ensure_study(study)
    assert Ledger.open(url, "data", 9.0, 1e-5).state.extensions[0].reason == "the board said so"
    with pytest.raises(
        LedgerError, match=r"has another epsilon, got 8.0, expected 9.*0 of it.*ledger extend"
    ):
        Ledger.open(url, "data", 8.0, 1e-5)
    assert verify(url).ok


def test_shares_in_decimals_add_up_to_the_whole(tmp_path):
    ledger = Ledger.open(str(tmp_path / "l"), "data", 0.3, 3e-6)
    quiet = Mechanism("poisson_gaussian", 1.0, 1000.0)
    for name, share in (("a", 0.1), ("b", 0.2)):
        ledger.ensure_study(Study(name, quiet, share, 1e-6, 1))
    with pytest.raises(BudgetExceeded):
        ledger.ensure_study(Study("c", quiet, 0.001, 1e-6, 1))


@pytest.mark.parametrize(
    "arguments", [("other", 8.0, 1e-5), ("data", 9.0, 1e-5), ("data", 8.0, 2e-5)]
)
def test_another_dataset_or_budget_is_refused(url, arguments):
    fresh(url)
    with pytest.raises(LedgerError, match="another"):
        Ledger.open(url, *arguments)


def test_a_missing_ledger_is_not_made_unasked(url, tmp_path):
    for call in (
        lambda: Ledger.open(url),
        lambda: Ledger.open(url, "data", 8.0, 1e-5, create=False),
    ):
        with pytest.raises(LedgerError, match="no ledger"):
            call()
    with pytest.raises(ConfigError):
        Ledger.open(url, "data", float("nan"), 1e-5)
    assert not (tmp_path / "ledger").exists()


def test_unknown_names_are_errors(url):
    ledger = fresh(url)
    for call in (
        lambda: ledger.begin_attempt("nope", "r", "id"),
        lambda: ledger.charge("s", "nope", 1, 0, 1),
        lambda: ledger.charge("s", "r", 1, 0, 1),
        lambda: ledger.begin_attempt("s", "", "id"),
        lambda: ledger.begin_attempt("s", "a\nb", "id"),
        lambda: ledger.epsilon_spent("nope"),
    ):
        with pytest.raises(GrapeRayError):
            call()


@pytest.mark.parametrize("bad", [0, -1, 1.5, float("nan"), True, 10**12, "3", None])
def test_bad_counts_are_refused_before_anything_is_written(url, bad):
    ledger = fresh(url)
    attempt = ledger.begin_attempt("s", "r", "id")
    entries = ledger.state.next_seq
    with pytest.raises(ConfigError):
        ledger.charge("s", "r", attempt, 0, bad)
    assert ledger.state.next_seq == entries


def test_two_ledgers_have_two_names(tmp_path):
    assert fresh(str(tmp_path / "a")).ledger_id != fresh(str(tmp_path / "b")).ledger_id


def _greedy(url, run, results, count=40):
    ledger = Ledger.open(url)
    attempt = ledger.begin_attempt("s", run, "id")
    granted = sum(ledger.charge("s", run, attempt, chunk, 3).steps for chunk in range(count))
    results.put(granted)


def _check_greedy(url, granted, tokens):
    assert sum(granted) == tokens
    assert Ledger.open(url).state.study("s").used == tokens
    assert verify(url).ok


def test_threads_never_overdraw(url):
    study = Study("s", Mechanism("poisson_gaussian", 1.0, 50.0), 4.0, 1e-6, 100)
    fresh(url, study)
    results = queue.Queue()
    threads = [threading.Thread(target=_greedy, args=(url, f"r{i}", results)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _check_greedy(url, [results.get_nowait() for _ in threads], 100)


def test_of_two_studies_that_race_for_the_last_share_one_is_registered(url):
    ledgers = [Ledger.open(url, "data", 5.0, 1e-5) for _ in range(2)]
    ready, errors = threading.Barrier(2), []

    def register(number):
        ready.wait()
        try:
            ledgers[number].ensure_study(Study(f"s{number}", MECHANISM, 3.0, 1e-6, 1))
        except BudgetExceeded as error:
            errors.append(error)

    threads = [threading.Thread(target=register, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (error,) = errors
    assert "epsilon <= 2" in str(error)
    assert len(Ledger.open(url).state.studies) == 1
    assert verify(url).ok


def test_processes_never_overdraw(url):
    study = Study("s", Mechanism("poisson_gaussian", 1.0, 50.0), 4.0, 1e-6, 100)
    fresh(url, study)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_greedy, args=(url, f"r{i}", results)) for i in range(2)]
    for process in processes:
        process.start()
    granted = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    _check_greedy(url, granted, 100)


def test_creators_at_one_time_agree_on_one_ledger(url):
    ledgers = []
    threads = [threading.Thread(target=lambda: ledgers.append(fresh(url))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledgers) == 6
    assert len({ledger.ledger_id for ledger in ledgers}) == 1
    assert len({ledger.state.head for ledger in ledgers}) == 1


def test_writers_never_make_the_same_bytes(tmp_path, monkeypatch):
    """Storage that lost an answer tells by the bytes whose entry it holds; two attempts of one
    number would share their noise.
    """
    monkeypatch.setattr("time.time", lambda: 1.0)
    made = []
    for name in ("a", "b"):
        Ledger.open(tmp_path / name, "data", 1.0, 1e-5)
        made.append((tmp_path / name / "00000000.json").read_bytes())
    one, two = (json.loads(data) for data in made)
    assert one["time"] == two["time"] == 1.0
    assert one["nonce"] != two["nonce"]
