"""Checkpoints: whole or passed over, never half believed."""

import pytest
import torch
from torch import nn

from grape_ray import checkpoint
from grape_ray.errors import CheckpointError
from grape_ray.storage import Storage


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight


def saved(storage, step, model=None):
    state = {"first/a": torch.full((3,), float(step)), "updates": step, "period": 1}
    return checkpoint.save(storage, step, model or nn.Linear(4, 2), state, {"ledger_head": "h", "executed_steps": step})


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    place = Storage(tmp_path / "run" if request.param == "local" else f"memory://{tmp_path.name}/run")
    yield place
    for name in place.list():
        place.remove(name)


def test_what_is_saved_comes_back(storage):
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    saved(storage, 7, model)
    found = checkpoint.latest(storage)
    checkpoint.restore(other, found.model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert (found.step, found.optimizer["updates"], found.facts["ledger_head"]) == (7, 7, "h")
    assert torch.equal(found.optimizer["first/a"], torch.full((3,), 7.0))


def test_a_tied_tensor_is_saved_once_and_stays_tied(storage):
    model, other = Tied(), Tied()
    saved(storage, 1, model)
    found = checkpoint.latest(storage)
    assert list(found.model) == ["table.weight"]
    checkpoint.restore(other, found.model)
    assert torch.equal(other.head.weight, model.table.weight)
    assert other.head.weight is other.table.weight


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "no file", "short file", "flipped bit"])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(storage, damage):
    saved(storage, 4)
    newest = saved(storage, 8)
    manifest, file = f"{newest}/manifest.json", f"{newest}/model.safetensors"
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


def test_a_step_saved_twice_is_the_second(storage):
    saved(storage, 4)
    model = nn.Linear(4, 2)
    saved(storage, 4, model)
    assert torch.equal(checkpoint.latest(storage).model["weight"], model.weight)


def test_retention_keeps_the_newest_and_removes_old_wrecks(storage):
    for step in (1, 2, 3, 4):
        saved(storage, step)
    storage.remove(f"{checkpoint.folder_of(1)}/manifest.json")
    checkpoint.retain(storage, 2)
    assert {name.split("/")[1] for name in storage.list("checkpoints/")} == {"step-00000003", "step-00000004"}
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


def test_another_model_is_refused_before_anything_changes(storage):
    saved(storage, 1)
    found, other = checkpoint.latest(storage), nn.Linear(5, 2)
    before = other.weight.clone()
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.restore(other, found.model)
    assert torch.equal(before, other.weight)
