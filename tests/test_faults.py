"""Storage that throttles, times out, refuses, tears, loses answers or dies for a while: recovered
from, or one clear error in time.
"""

import multiprocessing
import resource
import threading
import time

import pytest
import torch

from grape_ray import checkpoint
from grape_ray.accounting import Mechanism
from grape_ray.checkpoint import State, Writer, share
from grape_ray.distributed.comms import Comms
from grape_ray.errors import LedgerError, StorageError
from grape_ray.ledger import Ledger, Study, verify
from grape_ray.ray_backend.train import train
from grape_ray.storage import Storage
from tests.support.tiny import tiny

pytest.importorskip("moto.server", reason="needs moto[server]: pip install grape-ray[s3]")
pytest.importorskip("s3fs", reason="needs s3fs: pip install grape-ray[s3]")
from tests.support import soak
from tests.support.faulty_s3 import FaultyS3

STUDY = Study("s", Mechanism("poisson_gaussian", 1.0, 10.0), 4.0, 1e-6, 50)


@pytest.fixture(scope="module")
def server():
    found = FaultyS3(hang_s=20)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found
    found.stop()


@pytest.fixture
def url(server, request):
    return f"s3://bucket/{abs(hash(request.node.name))}"


@pytest.mark.parametrize("kind", ["throttle", "error", "torn", "lost"])
def test_what_passes_is_tried_again(server, url, kind):
    store = Storage(url, 30)
    store.write("a", b"one")
    for call in (
        lambda: store.write("a", b"two"), lambda: store.read("a"), lambda: store.list(),
        lambda: store.exists("a"), lambda: store.create("b", b"x"),
        lambda: store.upload("c", lambda: [b"part"] * 3), lambda: store.remove("b"),
    ):  # fmt: skip
        server.plan(kind, times=4)
        call()
        server.forget()
    assert (store.read("a"), store.read("c"), store.exists("b")) == (b"two", b"part" * 3, False)


def test_a_creation_whose_answer_was_lost_is_known_for_ones_own(server, url):
    store = Storage(url, 30)
    server.plan("lost", method="PUT", path="mine")
    store.create("mine", b"me 1")
    assert server.injected["lost"]
    with pytest.raises(FileExistsError):
        store.create("mine", b"me 2")
    store.create("other", b"somebody")
    server.plan("throttle", times=6, method="PUT", path="other")
    with pytest.raises(FileExistsError):
        store.create("other", b"me")
    assert store.read("other") == b"somebody"


def test_a_multipart_upload_survives_torn_and_lost_parts(server, url):
    store, block = Storage(url, 60), bytes(range(256)) * 4096
    server.plan("torn", times=2, method="PUT", path="big")
    server.plan("lost", method="PUT", path="big")
    server.plan("throttle", times=8, method="PUT", path="big")
    store.upload("big", lambda: (block for _ in range(40)))
    assert server.waiting == 0
    assert store.size("big") == 40 * len(block)
    assert store.read("big", 16 << 20, (16 << 20) + 256) == block[:256]


def test_storage_that_dies_for_a_while_is_waited_for(server, url):
    store = Storage(url, 60)
    store.write("a", b"one")
    with server.down():
        reading = []
        thread = threading.Thread(target=lambda: reading.append(store.read("a")))
        thread.start()
        time.sleep(3)
        assert not reading
    thread.join(60)
    assert reading == [b"one"]


def test_storage_that_stays_away_is_one_clear_error_in_time(server, url):
    store = Storage(url, 2)
    began = time.monotonic()
    with (
        server.down(),
        pytest.raises(StorageError, match=r"cannot write a in s3://.*tried for 2 s.*resume"),
    ):
        store.write("a", b"one")
    assert time.monotonic() - began < 20


def test_the_first_contact_with_storage_is_short_and_advises_no_resume(server, url, tmp_path):
    config = tiny(public=False).override(["performance.storage_timeout_s=1"])
    began = time.monotonic()
    with (
        server.down(),
        pytest.raises(
            StorageError, match=r"cannot create probe.*tried for 1 s.*check the address"
        ) as caught,
    ):
        train(config, storage=url, key_path=str(tmp_path / "key"))
    assert "resume" not in str(caught.value)
    assert time.monotonic() - began < 15
    assert Storage(url, 600).first_contact().deadline_s <= 15
    assert list(tmp_path.iterdir()) == []


def test_a_request_that_is_never_answered_ends(server, url, monkeypatch):
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 1.5)  # 15 s as a rule
    store = Storage(url, 1)
    began = time.monotonic()
    server.plan("hang", times=20)
    with pytest.raises(StorageError, match="cannot read"):
        store.read("a")
    server.forget()
    assert time.monotonic() - began < 15


def test_what_cannot_pass_is_told_at_once(server, url):
    began = time.monotonic()
    with pytest.raises(StorageError):
        Storage("s3://no-such-bucket/x", 60).write("a", b"")
    with pytest.raises(FileNotFoundError):
        Storage(url, 60).read("missing")
    assert time.monotonic() - began < 5


def test_a_ledger_on_bad_storage_never_undercounts_and_grants_no_step_twice(server, url):
    ledger = Ledger.open(Storage(url, 30), "data", 8.0, 1e-5)
    ledger.ensure_study(STUDY)
    granted = []
    for index, kind in enumerate(["lost", "torn", "throttle", "lost", "error"]):
        server.plan(kind, times=1 + index % 3, method="PUT")
        attempt = ledger.begin_attempt("s", "r", "id")
        server.plan(kind, times=1 + index % 3, method="PUT")
        grant = ledger.charge("s", "r", attempt, 0, 4, first_step=0)
        granted.append((attempt, grant.first_step, grant.steps))
    server.forget()
    assert granted == [(n, 0, 4) for n in (1, 2, 3, 4, 5)]
    assert Ledger.open(url, create=False).state.study("s").used == 20
    assert verify(url, ledger.head).ok


def test_a_ledger_out_of_reach_grants_nothing(server, url):
    ledger = Ledger.open(Storage(url, 1), "data", 8.0, 1e-5)
    ledger.ensure_study(STUDY)
    attempt = ledger.begin_attempt("s", "r", "id")
    with server.down(), pytest.raises(LedgerError, match="cannot be reached"):
        ledger.charge("s", "r", attempt, 0, 4)
    assert Ledger.open(url, create=False).state.study("s").used == 0
    assert ledger.charge("s", "r", attempt, 0, 4).steps == 4


def test_a_checkpoint_is_never_torn_by_storage_that_fails_under_it(server, url):
    place = Storage(url, 1.0)
    tensors = {"w": torch.randn(64, 8)}
    writer = Writer(place, Comms.local(), 5, 60)
    writer.begin(
        checkpoint.folder_of(1), 1, State({"model": share(tensors, 0, 1)}, {"optimizer": {}})
    )
    writer.flush()
    server.plan("torn", times=500, method="PUT", path="step-00000002")
    writer.begin(
        checkpoint.folder_of(2), 2, State({"model": share(tensors, 0, 1)}, {"optimizer": {}})
    )
    with pytest.raises(StorageError, match="step-00000002"):
        writer.flush()
    server.forget()
    found = checkpoint.latest(place)
    assert found.step == 1
    assert torch.equal(found.model["w"], tensors["w"])


def test_a_run_on_storage_that_fails_all_the_time_ends_with_everything_paid(server, url, tmp_path):
    config = tiny(8, slow_s=0.02).override(
        ["performance.checkpoint_every=2", "performance.charge_chunk=2"]
    )
    for kind, times in (("throttle", 3), ("torn", 2), ("lost", 3), ("error", 2)):
        server.plan(kind, times=times)
    before = sum(server.injected.values())
    over = threading.Event()

    def keep_failing():
        kinds = ["lost", "throttle", "torn", "error"]
        while not over.wait(0.15):
            if server.waiting < 2:
                server.plan(kinds[sum(server.injected.values()) % 4], method="PUT")

    thread = threading.Thread(target=keep_failing)
    thread.start()
    result = train(config, run="r", storage=url, key_path=str(tmp_path / "key"))
    over.set()
    thread.join()
    server.forget()
    assert sum(server.injected.values()) - before >= 10
    assert (result.steps, result.charged_steps) == (8, 8)
    assert verify(result.ledger).ok
    assert checkpoint.latest(Storage(f"{url}/r")).step == 8


def test_a_soak_fails_where_a_promise_is_broken_or_faults_are_missing():
    found = {
        "ledger_ok": True,
        "noises_drawn_twice": 0,
        "noises_unpaid": 0,
        "faults": {"torn": 2, "kill worker": 3},
    }
    assert soak.broken(found, 5) == []
    assert soak.broken(found, 6) == ["faults injected: got 5, expected 6"]
    for name, value in (("ledger_ok", False), ("noises_drawn_twice", 1), ("noises_unpaid", 1)):
        (problem,) = soak.broken({**found, name: value}, 5)
        assert problem.startswith(f"{name}: got {value}")


def _fill(folder, answers):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        Storage(folder, deadline_s=0.5).upload("big", lambda: (bytes(50_000) for _ in range(10)))
    except StorageError as error:
        answers.put(str(error))
    answers.put(Storage(folder).list())


def test_a_full_disk_is_one_clear_error_and_leaves_no_part(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_fill, args=(str(tmp_path / "store"), answers))
    process.start()
    text = answers.get(timeout=60)
    assert "cannot write big" in text
    assert "free space" in text
    assert answers.get(timeout=60) == []
    process.join()
