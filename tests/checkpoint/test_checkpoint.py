"""Checkpoints: whole or passed over, never half believed; shards of any ranks, written in the
background.
"""

import itertools
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from grape_ray import checkpoint
from grape_ray.checkpoint import Reader, Shard, State, Writer
from grape_ray.checkpoint.shards import share
from grape_ray.distributed.comms import Comms
from grape_ray.errors import CheckpointError, StorageError
from grape_ray.storage import Storage


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight


def state_of(model, step=0, base=None):
    tensors = {
        "model": checkpoint.distinct(model),
        "optimizer": {"first/a": torch.full((3,), float(step))},
    }
    shards = {kind: share(named, 0, 1) for kind, named in tensors.items()}
    return State(
        shards,
        {"optimizer": {"updates": step, "period": 1}},
        {"ledger_head": "h", "executed_steps": step},
        base,
    )


def saved(storage, step, model=None, attempt=1, keep=100, base=None):
    name, writer = checkpoint.folder_of(step, attempt), Writer(storage, Comms.local(), keep, 30)
    writer.begin(name, step, state_of(model or nn.Linear(4, 2), step, base))
    writer.flush()
    return name


class Several:
    """The ranks of one attempt as threads, speaking through a barrier: what a Writer needs of
    Comms.
    """

    def __init__(self, world_size):
        self.world_size, self.boxes, self.barrier = (
            world_size,
            [None] * world_size,
            threading.Barrier(world_size),
        )

    def rank(self, rank):
        group = self

        class Member(Comms):
            def gather_objects(self, value):
                group.boxes[rank] = value  # pyright: ignore[reportCallIssue]
                group.barrier.wait(30)
                found = list(group.boxes)
                group.barrier.wait(30)
                return found

        return Member(rank, self.world_size)

    def run(self, work):
        """Results, or what was raised, by rank."""
        results = [None] * self.world_size

        def one(rank):
            try:
                results[rank] = work(self.rank(rank))
            except Exception as error:
                results[rank] = error  # pyright: ignore[reportCallIssue]

        threads = [threading.Thread(target=one, args=(r,)) for r in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    place = Storage(
        tmp_path / "run" if request.param == "local" else f"memory://{tmp_path.name}/run"
    )
    yield place
    for name in place.list():
        place.remove(name)


def test_what_is_saved_comes_back(storage):
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    saved(storage, 7, model)
    found = checkpoint.latest(storage)
    checkpoint.restore(other, found)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values())
    )
    assert (found.step, found.optimizer["updates"], found.metadata["ledger_head"]) == (7, 7, "h")
    assert torch.equal(found.optimizer["first/a"], torch.full((3,), 7.0))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.bool,
        torch.uint8,
        torch.uint16,
        torch.complex64,
    ],
)
def test_every_kind_of_tensor_comes_back_and_anybody_can_open_the_file(tmp_path, dtype):
    place = Storage(tmp_path)
    tensors = {
        "plain": torch.arange(24).reshape(6, 4).to(dtype),
        "scalar": torch.tensor(3).to(dtype),
        "empty": torch.zeros(0, 5).to(dtype),
    }
    tensors["strided"] = tensors["plain"].T
    writer = Writer(place, Comms.local(), 1, 30)
    writer.begin(
        "checkpoints/step-00000001-attempt-0001",
        1,
        State({"model": share(tensors, 0, 1)}, {"optimizer": {}}),
    )
    writer.flush()
    reader = Reader(place, writer.committed)
    opened = load_file(tmp_path / writer.committed / "model-00001-of-00001.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(reader.read("model", name), tensor)
        assert torch.equal(opened[name], tensor)


def test_a_tensor_that_no_file_holds_is_refused_by_name(tmp_path):
    writer = Writer(Storage(tmp_path), Comms.local(), 1, 30)
    shards = share({"wave": torch.zeros(2, dtype=torch.complex128)}, 0, 1)
    writer.begin(
        "checkpoints/step-00000001-attempt-0001", 1, State({"model": shards}, {"optimizer": {}})
    )
    with pytest.raises(
        CheckpointError,
        match=r"tensor 'wave' has a type that no checkpoint holds, got 'torch.complex128'",
    ):
        writer.flush()


def test_a_tied_tensor_is_saved_once_and_stays_tied(storage):
    model, other = Tied(), Tied()
    saved(storage, 1, model)
    found = checkpoint.latest(storage)
    assert list(found.model) == ["table.weight"]
    checkpoint.restore(other, found)
    assert torch.equal(other.head.weight, model.table.weight)
    assert other.head.weight is other.table.weight


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_a_state_so_that_each_byte_is_written_once(world_size):
    tensors = {f"t{i}": torch.randn(n, 3) for i, n in enumerate((1, 2, 7, 40, 400))} | {
        "scalar": torch.tensor(1.0)
    }
    parts = [share(tensors, rank, world_size) for rank in range(world_size)]
    for name, tensor in tensors.items():
        mine = sorted((p[name] for p in parts if name in p), key=lambda s: s.start)
        assert torch.equal(
            torch.cat([s.tensor for s in mine]) if tensor.ndim else mine[0].tensor, tensor
        )
        assert sum(s.tensor.numel() for s in mine) == tensor.numel()
    sizes = [sum(s.tensor.numel() for s in p.values()) for p in parts]
    assert max(sizes) <= 1.3 * sum(sizes) / world_size + 120


@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (2, 1), (3, 2)])
def test_a_checkpoint_is_restored_on_another_number_of_ranks(storage, writers, readers):
    tensors = {"big": torch.randn(50, 4), "small": torch.randn(3), "one": torch.tensor(2.0)}

    def write(comms):
        writer = Writer(storage, comms, 2, 30)
        writer.begin(
            checkpoint.folder_of(1),
            1,
            State({"model": share(tensors, comms.rank, writers)}, {"optimizer": {}}),
        )
        writer.flush()
        return writer.committed

    assert Several(writers).run(write) == [checkpoint.folder_of(1)] * writers
    assert not [name for name in storage.list("checkpoints/") if "rank-" in name]
    reader = Reader(storage, checkpoint.folder_of(1))
    bounds = np.linspace(0, 50, readers + 1).astype(int)
    parts = [reader.read("model", "big", int(a), int(b - a)) for a, b in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat(parts), tensors["big"])
    assert all(torch.equal(reader.read("model", n), t) for n, t in tensors.items())


def test_only_the_files_that_hold_the_wanted_rows_are_read(storage, monkeypatch):
    tensor = torch.randn(40, 2)

    def write(comms):
        writer = Writer(storage, comms, 2, 30)
        mine = Shard(tensor[comms.rank * 10 : comms.rank * 10 + 10], (40, 2), comms.rank * 10)
        writer.begin(checkpoint.folder_of(1), 1, State({"model": {"w": mine}}, {"optimizer": {}}))
        writer.flush()

    Several(4).run(write)
    reader, opened, plain = Reader(storage, checkpoint.folder_of(1)), [], storage.read
    monkeypatch.setattr(
        storage,
        "read",
        lambda name, *where: (opened.append(name.rpartition("/")[2]), plain(name, *where))[1],
    )
    assert torch.equal(reader.read("model", "w", 12, 10), tensor[12:22])
    assert opened == ["model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"]


def test_rows_that_no_rank_saved_are_missed(storage):
    writer = Writer(storage, Comms.local(), 2, 30)
    writer.begin(
        checkpoint.folder_of(1),
        1,
        State({"model": {"w": Shard(torch.ones(5, 2), (10, 2), 0)}}, {"optimizer": {}}),
    )
    writer.flush()
    with pytest.raises(CheckpointError, match="lacks rows of 'w'"):
        Reader(storage, checkpoint.folder_of(1)).read("model", "w")
    with pytest.raises(CheckpointError, match="holds no model tensor"):
        Reader(storage, checkpoint.folder_of(1)).read("model", "v")


@pytest.mark.parametrize(
    "damage", ["no manifest", "half a manifest", "no file", "short file", "flipped bit"]
)
def test_a_torn_checkpoint_is_passed_over_with_a_warning(storage, damage):
    saved(storage, 4)
    newest = saved(storage, 8)
    manifest, file = f"{newest}/manifest.json", f"{newest}/model-00001-of-00001.safetensors"
    if damage == "no manifest":
        storage.remove(manifest)
    elif damage == "half a manifest":
        storage.write(manifest, storage.read(manifest)[:40])
    elif damage == "no file":
        storage.remove(file)
    else:
        data = bytearray(storage.read(file))
        data[-1] ^= 1
        storage.write(file, bytes(data[:-2] if damage == "short file" else data))
    with pytest.warns(UserWarning, match="passed over"):
        found = checkpoint.latest(storage)
    assert found.step == 4


def test_no_checkpoint_is_none(storage):
    assert checkpoint.latest(storage) is None


def test_a_step_saved_by_two_attempts_is_the_later_ones(storage):
    saved(storage, 4, attempt=1)
    model = nn.Linear(4, 2)
    saved(storage, 4, model, attempt=2)
    saved(storage, 4, attempt=1)  # of a process that does not know that it is over
    assert torch.equal(checkpoint.latest(storage).model["weight"], model.weight)


def test_the_checkpoint_of_a_step_is_the_latest_attempts_whole_one(storage):
    for attempt in (1, 2, 3):
        saved(storage, 4, attempt=attempt)
    storage.remove(f"{checkpoint.folder_of(4, 3)}/manifest.json")
    assert checkpoint.of_step(storage, 4) == checkpoint.folder_of(4, 2)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5"):
        checkpoint.of_step(storage, 5)


def test_retention_keeps_the_newest_and_removes_old_wrecks(storage):
    for step in (1, 2, 3, 4):
        saved(storage, step)
    storage.remove(f"{checkpoint.folder_of(1)}/manifest.json")
    checkpoint.retain(storage, 2)
    assert {checkpoint.step_of(name) for name in checkpoint.names(storage)} == {3, 4}
    checkpoint.retain(storage, 2)
    assert checkpoint.latest(storage).step == 4


def test_retention_counts_only_whole_checkpoints(storage):
    for step in (1, 2, 3):
        saved(storage, step)
    storage.remove(f"{checkpoint.folder_of(3)}/manifest.json")
    checkpoint.retain(storage, 2)
    with pytest.warns(UserWarning, match="torn"):
        assert checkpoint.latest(storage).step == 2
    assert storage.exists(f"{checkpoint.folder_of(1)}/manifest.json")


def test_retention_never_removes_what_a_kept_delta_starts_from(storage):
    base = saved(storage, 1)
    for step in (2, 3, 4):
        saved(storage, step, base=base, keep=2)
    assert [checkpoint.step_of(name) for name in checkpoint.names(storage)] == [4, 3, 1]


def test_another_model_is_refused_before_anything_changes(storage):
    saved(storage, 1)
    found, other = checkpoint.latest(storage), nn.Linear(5, 2)
    before = other.weight.clone()
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.restore(other, found)
    assert torch.equal(before, other.weight)


class Slow(Storage):
    """Storage whose uploads take a while, or fail."""

    gate: threading.Event
    error: Exception | None = None

    def upload(self, name, blocks):
        self.gate.wait(30)
        if self.error:
            raise self.error
        super().upload(name, blocks)


def test_the_state_of_the_moment_is_written_while_training_goes_on(tmp_path):
    place, model = Slow(tmp_path), nn.Linear(4, 2)
    place.gate = threading.Event()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    writer = Writer(place, Comms.local(), 2, 30)
    began = time.monotonic()
    writer.begin(checkpoint.folder_of(1), 1, state_of(model))
    assert time.monotonic() - began < 5
    assert not writer.ready()
    assert checkpoint.names(place) == []
    with torch.no_grad():
        model.weight.add_(1)
    place.gate.set()
    writer.flush()
    assert all(torch.equal(checkpoint.latest(place).model[n], t) for n, t in before.items())
    assert writer.lag_s > 0


def test_a_failure_of_any_rank_is_raised_on_every_rank_and_commits_nothing(tmp_path):
    def write(comms):
        place = Slow(tmp_path)
        place.gate = threading.Event()
        place.gate.set()
        place.error = StorageError("the store is down") if comms.rank == 1 else None
        writer = Writer(place, comms, 2, 30)
        writer.begin(
            checkpoint.folder_of(1),
            1,
            State({"model": share({"w": torch.ones(8, 2)}, comms.rank, 2)}, {"optimizer": {}}),
        )
        writer.flush()

    raised = Several(2).run(write)
    assert [str(e) for e in raised] == ["the store is down"] * 2
    assert not Storage(tmp_path).exists(f"{checkpoint.folder_of(1)}/manifest.json")


def test_an_upload_that_never_ends_is_an_error_at_the_deadline(tmp_path):
    place = Slow(tmp_path)
    place.gate = threading.Event()
    writer = Writer(place, Comms.local(), 2, 0.3)
    writer.begin(checkpoint.folder_of(1), 1, state_of(nn.Linear(4, 2)))
    with pytest.raises(CheckpointError, match="not written in time"):
        writer.flush()
    place.gate.set()
