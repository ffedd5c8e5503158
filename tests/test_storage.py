"""The storage seam on a local folder, in memory and on S3, and the ledger over each of them."""

import multiprocessing
import os
import threading
import time
import uuid

import pytest

from grape_ray.accounting import Mechanism
from grape_ray.errors import LedgerError, StorageError
from grape_ray.ledger import Ledger, Study, verify
from grape_ray.storage import Storage
from tests.support.bucket import s3_bucket


@pytest.fixture(scope="module")
def bucket():
    """A bucket on a loopback server that honours conditional writes."""
    with s3_bucket() as url:
        yield url


@pytest.fixture(params=["local", "memory", "s3"])
def url(request, tmp_path):
    """A fresh folder on each kind of storage."""
    if request.param == "local":
        return str(tmp_path / "store")
    name = uuid.uuid4().hex
    return (
        f"memory://{name}"
        if request.param == "memory"
        else f"{request.getfixturevalue('bucket')}/{name}/deep"
    )


def test_create_read_write_list_remove(url):
    store = Storage(url)
    assert store.list() == []
    assert not store.exists("a/1")
    store.create("a/1", b"one")
    store.create("b", b"")
    assert (store.read("a/1"), store.read("b")) == (b"one", b"")
    assert store.list() == ["a/1", "b"]
    assert store.list("a/") == store.list("a") == ["a/1"]
    assert store.child("a").list() == ["1"]
    assert store.exists("a/1")
    store.upload("c/2", lambda: iter([b"t", memoryview(b"wo")]))
    assert (store.read("c/2"), store.read("c/2", 1, 3), store.size("c/2")) == (b"two", b"wo", 3)
    store.write("a/1", b"uno")
    store.write("new", b"x")
    assert store.read("a/1") == b"uno"
    store.remove("a")
    store.remove("a")
    assert store.list() == ["b", "c/2", "new"]


def test_a_taken_name_stays_as_it_is(url):
    store = Storage(url)
    store.create("n", b"first")
    with pytest.raises(FileExistsError):
        store.create("n", b"second")
    assert store.read("n") == b"first"


def test_of_many_creators_one_wins(url):
    wins = []

    def create(i):
        store = Storage(url)
        try:
            store.create("n", b"%d" % i)
            wins.append(i)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert Storage(url).read("n") == b"%d" % wins[0]


def test_a_missing_name_is_file_not_found(url):
    with pytest.raises(FileNotFoundError):
        Storage(url).read("missing")
    with pytest.raises(FileNotFoundError):
        Storage(url).size("missing")


def test_check_writable_leaves_nothing(url):
    Storage(url).check_writable()
    assert Storage(url).list() == []


def test_check_writable_leaves_no_folder_either(tmp_path):
    Storage(tmp_path / "a" / "b" / "c").check_writable()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_anothers_check_takes_away_is_made_again(tmp_path, monkeypatch):
    plain, taken = os.open, []

    def late(path, flags, mode=0o777):
        if len(taken) < 3:
            taken.append(os.rmdir(tmp_path / "a"))
        return plain(path, flags, mode)

    monkeypatch.setattr(os, "open", late)
    Storage(tmp_path / "a").create("n", b"x")
    assert Storage(tmp_path / "a").read("n") == b"x"


def test_a_private_file_is_its_owners_alone(tmp_path):
    Storage(tmp_path).create("a", b"", private=True)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    Storage("memory://private").create(uuid.uuid4().hex, b"", private=True)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "."])
def test_names_stay_inside(url, name):
    with pytest.raises(StorageError, match="leaves its folder"):
        Storage(url).write(name, b"")


def test_a_ledger_on_each_storage(url):
    first, second = (Ledger.open(url, "data", 8.0, 1e-5) for _ in range(2))
    study = Study("s", Mechanism("poisson_gaussian", 1.0, 10.0), 4.0, 1e-6, 10)
    attempts = []
    for ledger, run in ((first, "a"), (second, "b")):
        ledger.ensure_study(study)
        attempts.append(ledger.begin_attempt("s", run, "id"))
    granted = [
        first.charge("s", "a", attempts[0], 0, 6).steps,
        second.charge("s", "b", attempts[1], 0, 6).steps,
    ]
    assert granted == [6, 4]
    assert first.charge("s", "a", attempts[0], 0, 6).steps == 6
    assert verify(url, second.head).ok


def test_a_crash_in_local_creation_leaves_no_half_written_file(tmp_path, monkeypatch):
    store = Storage(tmp_path)
    for broken in ("fsync", "link"):
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, _raise)
            with pytest.raises(StorageError, match="power cut"):
                store.create(f"n-{broken}", b"data")
        assert store.list() == []
    (tmp_path / ".tmp-left-by-a-killed-process").write_bytes(b"half")
    assert store.list() == []
    store.create("n-link", b"data")


def _raise(*_, **__):
    raise OSError("power cut")


def test_an_unwritable_place_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot create"):
        Storage(tmp_path / "file" / "sub").check_writable()
    with pytest.raises(StorageError, match="no driver"):
        Storage("nosuchprotocol://x")
    with pytest.raises(StorageError, match="empty"):
        Storage("")


def test_a_missing_bucket_is_one_clear_error(bucket):
    with pytest.raises(StorageError, match="cannot create"):
        Storage("s3://no-such-bucket/x").check_writable()
    with pytest.raises(LedgerError, match="cannot be reached"):
        Ledger.open("s3://no-such-bucket/x", "data", 8.0, 1e-5)


def test_storage_that_overwrites_is_refused(tmp_path, monkeypatch):
    store = Storage(tmp_path)
    monkeypatch.setattr(store, "create", store.write)
    with pytest.raises(StorageError, match="overwrites"):
        store.check_writable()


def _create_in_a_process(url, name, wins):
    try:
        Storage(url).create(name, b"x")
        wins.put(1)
    except FileExistsError:
        wins.put(0)


def test_of_two_processes_one_wins(tmp_path):
    context = multiprocessing.get_context("spawn")
    wins = context.Queue()
    processes = [
        context.Process(target=_create_in_a_process, args=(str(tmp_path), "n", wins))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    assert sum(wins.get(timeout=60) for _ in processes) == 1
    for process in processes:
        process.join()


@pytest.mark.parametrize("url", ["memory://many/files", None])
def test_many_files_are_read_in_order_and_missing_ones_told(tmp_path, url):
    storage = Storage(url or tmp_path)
    for number in range(0, 40, 2):
        storage.create(f"f{number}", b"%d" % number)
    assert storage.read_many(f"f{n}" for n in range(40)) == [
        b"%d" % n if n % 2 == 0 else None for n in range(40)
    ]


def test_storage_that_fails_is_not_asked_for_all_the_rest(monkeypatch):
    asked = []

    def fails(self, name, start=None, end=None):
        asked.append(name)
        time.sleep(0.01)
        raise StorageError("away")

    monkeypatch.setattr(Storage, "read", fails)
    with pytest.raises(StorageError, match="away"):
        Storage("memory://many/away").read_many(map(str, range(500)))
    assert len(asked) < 100
