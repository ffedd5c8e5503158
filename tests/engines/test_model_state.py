"""What counts as state of a model, how a change of it is seen, and what is put back."""

import contextlib
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from grape_ray.engines.capture.model_state import (
    ModelSnapshot,
    UntrainedState,
    awake,
    check_kinds,
    checksum,
    state_of,
    untrained,
)
from grape_ray.errors import UnsupportedLayer

# float32 entries of a buffer whose contents are compared after every pass, and of one where not
SMALL, LARGE = 1024, 1025


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("kept", torch.zeros(SMALL))
        self.register_buffer("unsaved", torch.zeros(LARGE), persistent=False)
        self.register_buffer("none", None)
        self.register_parameter("no_weight", None)
        self.listed, self.queue, self.named, self.members = [1], deque([1]), {"a": 1}, {1}
        self.array, self.large = np.zeros(512), np.zeros(513)
        self.held, self.word, self._hidden, self.nothing = torch.zeros(2), "a", [1], None


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.scale = Inner(), nn.Parameter(torch.ones(()))
        self.tied = self.inner.weight


def test_state_is_every_parameter_and_buffer_under_each_of_its_names():
    model = Outer()
    assert list(state_of(model)) == [
        "scale",
        "tied",
        "inner.kept",
        "inner.unsaved",
        "inner.weight",
        "inner.frozen",
    ]
    assert state_of(model)["tied"] is state_of(model)["inner.weight"] is model.tied
    assert state_of(model)["inner.unsaved"] is model.inner.unsaved
    assert set(untrained(model)) == {"inner.kept", "inner.unsaved", "inner.frozen"}


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.float32,
    torch.float64,
    torch.cfloat,
    torch.cdouble,
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 4)])
def test_a_change_of_one_entry_shows_in_the_checksum(dtype, shape):
    before = torch.ones(shape, dtype=dtype)
    for place in range(before.numel()):
        after = before.clone()
        after.view(-1)[place] = 0
        assert checksum(after) != checksum(before)
    assert checksum(before) == checksum(
        before.mT.contiguous().mT if before.ndim == 2 else before.clone()
    )


def test_exchanged_entries_other_shapes_and_other_types_show_in_the_checksum():
    values = torch.arange(12, dtype=torch.int32)
    assert checksum(values) != checksum(values.flip(0))
    assert checksum(values) != checksum(values.view(3, 4))
    assert checksum(torch.zeros(4)) != checksum(torch.zeros(4, dtype=torch.int32))
    # the bits count, not the values
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    large = torch.zeros((1 << 16) + 2, dtype=torch.int32)
    for i, j in ((0, 1), (0xFFFE, 0xFFFF), (1, 1 << 16)):
        a, b = large.clone(), large.clone()
        a[i] = b[j] = 1
        assert checksum(a) != checksum(b)
    several, sums = torch.zeros((1 << 20) + 3, dtype=torch.int32), set()
    for place in (0, 1, 0xFFFF, -1):  # of more than one chunk
        several[place] = 1
        sums.add(checksum(several))
        several[place] = 0
    assert len(sums | {checksum(several)}) == 5


def test_what_sleeps_is_woken_for_a_while_and_sleeps_again():
    model = nn.ParameterDict(
        {
            "asleep": torch.zeros(5),
            "other": torch.zeros(5),
            "empty": torch.zeros(0),
            "on": torch.tensor([0.0, 2.0]),
        }
    )
    model["frozen"] = nn.Parameter(torch.zeros(5), requires_grad=False)
    for _ in range(2):
        with contextlib.suppress(KeyError), awake(model):
            woken = model["asleep"].detach().clone()
            assert woken.all()
            assert woken.abs().max() < 0.1
            assert not torch.equal(woken, model["other"])
            assert model["on"].tolist() == [0.0, 2.0]
            assert not model["frozen"].any()
            raise KeyError
        assert not model["asleep"].any()
        assert model["on"].tolist() == [0.0, 2.0]
        assert all(param.grad_fn is None for param in model.values())


WRITES = {
    "kept": lambda m: m.kept.data.add_(1),
    "kept by the book": lambda m: m.kept.add_(1),
    "unsaved": lambda m: m.unsaved.add_(1),
    "weight": lambda m: m.weight.detach().add_(1),
    "frozen": lambda m: m.frozen.detach().add_(1),
    "kept replaced": lambda m: setattr(m, "kept", m.kept.clone()),
    "kept deleted": lambda m: delattr(m, "kept"),
    "added": lambda m: m.register_buffer("added", torch.zeros(1)),
    "none": lambda m: setattr(m, "none", torch.zeros(1)),
    "held": lambda m: m.held.add_(1),
    "listed": lambda m: m.listed.append(1),
    "listed in place": lambda m: m.listed.__setitem__(0, 2),
    "queue": lambda m: m.queue.append(1),
    "named": lambda m: m.named.update(a=2),
    "members": lambda m: m.members.add(2),
    "array": lambda m: m.array.__setitem__(3, 1.0),
    "large": lambda m: m.large.resize(514, refcheck=False),
}


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("wrapped", [True, False])
def test_writes_are_refused_by_name_after_every_pass(kind, wrapped):
    model = Outer() if wrapped else Inner()
    inner = model.inner if wrapped else model
    watch = ModelSnapshot(model)
    watch.check()
    WRITES[kind](inner)
    with pytest.raises(
        UnsupportedLayer, match=f"'({'inner.' if wrapped else ''}{kind.split()[0]}|tied)'"
    ):
        watch.check()


def test_what_is_no_state_may_change():
    model = Outer()
    model.inner.scratch, model.inner.one = torch.inference_mode()(torch.zeros)(2), 1
    watch = ModelSnapshot(model)
    model.inner._hidden.append(1)
    model.inner.word = "b"
    model.inner.frozen.grad = torch.zeros(2)
    model.inner.large[0] = 1.0  # a large array is watched by its size alone
    watch.check()


@pytest.mark.parametrize(
    "name", ["inner.kept", "inner.unsaved", "inner.weight", "inner.frozen", "scale"]
)
def test_what_goes_past_torch_shows_in_the_contents(name):
    model = Outer()
    watch = ModelSnapshot(model)
    before = watch.contents()
    assert watch.contents() == before
    state_of(model)[name].data.add_(1)
    tied = {"tied"} if name == "inner.weight" else set()
    assert {n for n, content in watch.contents().items() if content != before[n]} == {name} | tied


def test_attributes_are_put_back_and_parameters_left_where_they_are():
    model = Outer()
    watch, listed, held = ModelSnapshot(model), model.inner.listed, model.inner.held
    model.inner.listed, model.inner.held, model.inner.new = [2], torch.ones(2), 1
    del model.inner.word
    model.replaced = model.inner.word2 = 1
    model.inner.weight = nn.Parameter(torch.zeros(3))
    watch.restore_attributes()
    assert model.inner.listed is listed
    assert model.inner.held is held
    assert model.inner.word == "a"
    assert not hasattr(model, "replaced")
    assert not hasattr(model.inner, "new")
    assert not hasattr(model.inner, "word2")
    assert not model.inner.weight.any()  # which `check` refuses
    model.inner.new = 1
    del model.inner.nothing  # as many as before
    watch.restore_attributes()
    assert model.inner.nothing is None
    assert not hasattr(model.inner, "new")


def test_constants_are_what_no_batch_has_touched():
    model = Outer()
    inner = model.inner
    assert ModelSnapshot(model).constants() == {
        id(t) for t in (inner.kept, inner.unsaved, inner.frozen, inner.held)
    }


def test_what_training_does_not_train_is_saved_as_it_began():
    model = Outer()
    start = UntrainedState(model)
    model.inner.weight.data.add_(1)
    start.check()
    for tensor, name in (
        (model.inner.frozen, "frozen"),
        (model.inner.kept, "kept"),
        (model.inner.unsaved, "unsaved"),
    ):
        tensor.data[1] += 1  # pyright: ignore[reportIndexIssue]
        with pytest.raises(UnsupportedLayer, match=f"'inner.{name}'"):
            start.check()
        tensor.data[1] -= 1  # pyright: ignore[reportIndexIssue]
        start.check()
    model.inner.register_buffer("added", torch.zeros(1))
    with pytest.raises(UnsupportedLayer, match=r"'inner\.added'"):
        start.check()


def test_state_that_cannot_be_clipped_or_watched_is_refused_by_name():
    class Extra(nn.Module):
        def get_extra_state(self):
            return 1

    check_kinds(Outer(), {"w": torch.zeros(2)})
    with pytest.raises(UnsupportedLayer, match="'w'"):
        check_kinds(Outer(), {"v": torch.zeros(2), "w": torch.zeros(2, dtype=torch.cfloat)})
    with pytest.raises(UnsupportedLayer, match="'1'"):
        check_kinds(nn.Sequential(Outer(), Extra()), {})
    with pytest.raises(
        UnsupportedLayer, match=r"parameter 'w', got 'float16', expected bfloat16.*torch.float32"
    ):
        check_kinds(
            Outer(),
            {"v": torch.zeros(2, dtype=torch.bfloat16), "w": torch.zeros(2, dtype=torch.float16)},
        )
