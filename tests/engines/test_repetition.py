"""A pass made again: what it is given, what it may do, and how near losses must be."""

import functools
import random
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import _get_current_function_mode

from grape_ray import make_engine
from grape_ray.engines.capture.batches import is_mask
from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.dependence import Dependence
from grape_ray.engines.capture.dispatch import dispatch
from grape_ray.engines.capture.model_state import ModelSnapshot
from grape_ray.engines.capture.random_state import random_states
from grape_ray.engines.capture.tracked import Tracked
from grape_ray.engines.rules.table import HANDLERS
from grape_ray.engines.verification.repetition import Observation, Repetition, _distance, _same
from grape_ray.errors import UnsupportedLayer

CPU = torch.device("cpu")
LUCK = random.SystemRandom()  # no generator's state tells of it
NAN, INF = float("nan"), float("inf")


def rows_of(batch):
    return len(batch["x"])


def make_batch(rows=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, 3, generator=generator) + 0.5
    mask = (torch.rand(rows, 3, generator=generator) < 0.7).long()
    mask[:, 0], mask[:, 1] = 1, torch.arange(rows) % 2
    return {"x": x, "ids": torch.arange(rows) + 2, "mask": mask, "name": "no tensor"}


def check(
    loss,
    batch=None,
    *,
    thorough=True,
    drew=False,
    masked=False,
    losses=None,
    tolerance=1e-4,
    model=None,
):
    """Verifies a loss of batches alone; `losses`, if given, are those that the engine's rules are
    said to have found.
    """
    batch = make_batch() if batch is None else batch
    rows, state = rows_of(batch), random_states(CPU)

    def forward(given, count):
        assert rows_of(given) == count
        return loss(given)

    found = forward(batch, rows) if losses is None else losses
    seen = Dependence(rows, set(), Tracked)
    seen.drew, seen.masked = drew, masked
    capture = CapturePass(rows, None, CPU, set(), set(), functools.partial(dispatch, HANDLERS))
    Repetition(capture, forward, batch, state, tolerance).check(
        Observation(found, [], []), ModelSnapshot(model or nn.Module()), seen, thorough
    )


def plain(batch):
    return batch["x"].square().sum(1)


def seen_by(loss, **options):
    """Every batch that a verified loss was given, after the pass itself and in order."""
    given = []

    def recording(batch):
        given.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
        return loss(batch)

    check(recording, **options)
    return given[1:]


@pytest.mark.parametrize("thorough", [True, False])
def test_every_example_keeps_its_value_beside_others_that_are_exchanged(thorough):
    batch = make_batch()
    given = seen_by(plain, batch=batch, thorough=thorough)
    exchanged = [g for g in given if rows_of(g) == 6 and not torch.equal(g["ids"], batch["ids"])]
    company = [g for g in exchanged if torch.equal(g["mask"], batch["mask"])]
    assert len(exchanged) == 2 * len(company)  # once more each, with the masks
    kept = [g["ids"] == batch["ids"] for g in company]
    assert len(company) == (2 if thorough else 1)
    assert all(int(k.sum()) == 3 for k in kept)
    if thorough:
        assert torch.equal(kept[0], ~kept[1])  # every example is among those that must not notice
        assert any((g["x"] > 10).any() for g in company)  # so that little company shows as well
    for g, k in zip(company, kept):
        assert torch.equal(g["x"][k], batch["x"][k])
        assert torch.equal(g["mask"], batch["mask"])
        assert g["name"] == "no tensor"
        source = (g["ids"][:, None] == batch["ids"]).long().argmax(1)
        assert k[source].all()  # the others are replaced by those that stay
        ratio = g["x"] / batch["x"][source]
        # all of them as much larger, or undefined
        assert torch.allclose(ratio[~k], ratio[~k][0, 0], equal_nan=True)
    few = [g for g in given if rows_of(g) < 6]
    assert [rows_of(g) for g in few] == [3]
    assert all(torch.isin(g["ids"], batch["ids"]).all() for g in few)


def test_the_batch_itself_comes_again_unchanged():
    batch = make_batch()
    assert any(
        all(torch.equal(g[k], batch[k]) for k in ("x", "ids", "mask"))
        for g in seen_by(plain, batch=batch)
    )


MIXES = [lambda x: x.mean(0), lambda x: x.flip(0), lambda x: x.roll(1, 0), lambda x: x.max()]


@pytest.mark.parametrize(
    ("mix", "thorough"), [*((mix, True) for mix in MIXES), *((mix, False) for mix in MIXES[:3])]
)
def test_little_company_is_found_each_time(mix, thorough):
    for _ in range(4):
        with pytest.raises(UnsupportedLayer):
            check(
                lambda b: plain(b) + 1e-3 * mix(b["x"]).expand_as(b["x"]).sum(1), thorough=thorough
            )


@pytest.mark.parametrize("error", [RuntimeError, ValueError, IndexError, AssertionError])
def test_a_model_that_fails_beside_extreme_values_is_checked_beside_others(error):
    def careful(batch, mixed):
        if not (batch["x"] <= 30).all():
            raise error("too large, or undefined")
        return plain(batch) + mixed * batch["x"].mean()

    check(lambda b: careful(b, 0.0))
    with pytest.raises(UnsupportedLayer, match="beside other examples"):
        check(lambda b: careful(b, 1.0))


def test_a_model_that_fails_beside_any_others_fails_with_its_own_error():
    def unique(batch):
        if len(batch["ids"].unique()) < len(batch["ids"]):
            raise LookupError("twice the same")
        return plain(batch)

    with pytest.raises(LookupError, match="twice"):
        check(unique)


def test_a_repetition_knows_which_tensors_are_the_batchs_own():
    known = []

    def loss(batch):
        watching = _get_current_function_mode()
        if isinstance(watching, Dependence):
            known.append([watching.certain(batch[name]) for name in ("x", "ids", "mask")])
        return plain(batch)

    check(loss)
    assert known == [[True] * 3] * 3  # beside others, twice, and in a smaller batch


def jitter(size):
    return lambda b: plain(b) * (1 + size * torch.tensor([LUCK.random() for _ in b["x"]]))


def test_a_model_that_repeats_up_to_rounding_is_trained_and_its_company_is_still_found():
    for _ in range(3):
        check(jitter(1e-6))
        with pytest.raises(UnsupportedLayer):
            check(lambda b: jitter(1e-6)(b) + 0.1 * b["x"].mean())
    with pytest.raises(UnsupportedLayer, match="come again"):
        check(jitter(0.5), losses=plain(make_batch()), tolerance=1e-4)


def test_company_that_waits_for_an_extreme_is_found_in_a_model_that_repeats_up_to_rounding():
    with pytest.raises(UnsupportedLayer, match="beside other examples"):
        check(lambda b: jitter(1e-6)(b) * (0.5 if (b["x"] > 1e6).any() else 1.0))


@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.rand, lambda: np.random.randint(5)],
    ids=["python", "numpy", "numpy's integers"],
)
def test_random_numbers_that_are_not_torchs_are_refused_even_where_they_change_nothing(draw):
    with pytest.raises(UnsupportedLayer, match="global generator"):
        check(lambda b: plain(b) + 0 * float(draw()))


def test_random_numbers_that_several_examples_share_are_told_apart_from_company():
    with pytest.raises(UnsupportedLayer, match="share"):
        check(lambda b: plain(b) * (1 + torch.rand([])), drew=True)
    with pytest.raises(UnsupportedLayer, match="beside other examples"):
        check(lambda b: plain(b) + b["x"].mean() + 0 * torch.rand(6), drew=True)


@pytest.mark.parametrize(
    "rare", [lambda drawn: drawn < 0.02, lambda drawn: drawn > 0.98], ids=["low", "high"]
)
def test_luck_that_is_shared_and_rarely_shows_is_found(rare):
    for _ in range(4):
        with pytest.raises(UnsupportedLayer, match="share"):
            check(lambda b: plain(b) * (1 + rare(torch.rand([]))), drew=True)
    with pytest.raises(UnsupportedLayer, match="share"):
        check(lambda b: plain(b) * (1 + torch.rand([])), drew=True, thorough=False)


def test_generators_stand_where_they_stood():
    def dropped(batch):
        return torch.nn.functional.dropout(batch["x"], 0.5).square().sum(1)

    for loss in (plain, lambda b: plain(b) + 0 * torch.rand(rows_of(b)), dropped):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        loss(make_batch())
        after = torch.rand(2).tolist(), random.random(), np.random.rand()
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        check(loss, drew=loss is not dropped, masked=loss is dropped)
        assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == after


def test_losses_of_the_rules_are_those_of_torch():
    near, far = plain(make_batch()) * (1 + 1e-6), plain(make_batch())
    check(plain, losses=near)
    far[2] += 0.01
    with pytest.raises(UnsupportedLayer, match="by torch alone"):
        check(plain, losses=far)


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_the_number_of_examples_changes_no_loss(rows):
    with pytest.raises(UnsupportedLayer, match="in a smaller batch"):
        check(lambda b: plain(b) * (1 + 1e-3 * rows_of(b)), make_batch(rows))


def test_company_through_labels_of_zeros_and_ones_is_found():
    batch = {**make_batch(), "label": torch.tensor([0, 1, 1, 0, 1, 0])}
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    with pytest.raises(UnsupportedLayer, match="beside other examples"):
        check(lambda b: plain(b) + (b["label"] * weights).sum(), batch)


@pytest.mark.parametrize("thorough", [True, False])
def test_company_through_masks_is_found(thorough):
    with pytest.raises(UnsupportedLayer, match="beside other masks"):
        check(lambda b: plain(b) + b["mask"][:, 1].float().mean(), thorough=thorough)


def test_a_batch_that_only_resembles_a_dict_is_exchanged_too():
    check(plain, UserDict(make_batch()))
    with pytest.raises(UnsupportedLayer, match="beside other examples"):
        check(lambda b: plain(b) + b["x"].mean(), UserDict(make_batch()))


def test_masks_of_dropout_are_left_out_where_the_number_of_examples_differs():
    def dropped(batch):
        return torch.nn.functional.dropout(batch["x"], 0.5).square().sum(1)

    for _ in range(3):
        check(dropped, masked=True)
        with pytest.raises(UnsupportedLayer, match="in a smaller batch"):
            check(lambda b: dropped(b) * (1 + 1e-3 * rows_of(b)), masked=True)


def test_a_batch_of_one_is_verified_too():
    check(plain, make_batch(1))
    calls = []
    with pytest.raises(UnsupportedLayer, match="come again"):
        check(
            lambda b: plain(b) + (calls.append(1) or len(calls)),
            make_batch(1),
            losses=plain(make_batch(1)) + 2,
        )
    with pytest.raises(UnsupportedLayer, match="global generator"):
        check(lambda b: plain(b) + 0 * random.random(), make_batch(1))


def test_a_model_that_holds_what_it_does_not_write_is_right():
    model = nn.Module()
    model.register_buffer("kept", torch.ones(3))
    check(lambda b: plain(b) * model.kept.sum(), model=model)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("past", [True, False])
def test_what_a_repetition_writes_is_found(past):
    model = nn.Module()
    model.register_buffer("kept", torch.zeros(3))

    def writes(batch):
        (model.kept.data if past else model.kept).add_(1)  # pyright: ignore[reportCallIssue]
        return plain(batch)

    with pytest.raises(UnsupportedLayer, match="'kept'"):
        check(writes, model=model)


def test_equal_bits_and_nan_beside_nan_are_the_same_and_nothing_else_is():
    a = torch.tensor([1.0, NAN, INF, -INF])
    assert _same(a, a.clone())
    for i, value in ((0, 1 + 2**-23), (0, NAN), (1, 1.0), (2, -INF), (3, 1.0)):
        b = a.clone()
        b[i] = value
        assert not _same(a, b)
        assert not _same(b, a)


@pytest.mark.parametrize(
    ("a", "b", "apart"),
    [
        ([], [], 0.0),
        ([0.5, 0.25], [0.5, 0.5], 0.25),  # of losses below 1 the difference itself
        ([4.0, -8.0], [4.0, -6.0], 0.25),
        ([-8.0, 4.0], [-8.0, 5.0], 0.125),
        ([INF, 1.0], [INF, 1.5], 0.5),
        ([NAN, INF], [INF, NAN], 0.0),
        ([NAN, 1.0], [1.0, 1.0], INF),
        ([1.0, 1.0], [1.0, INF], INF),
    ],
)
def test_distances_are_relative_to_the_largest_and_infinite_where_one_side_is_not_finite(
    a, b, apart
):
    assert _distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(apart)


def test_masks_are_what_holds_nothing_but_zeros_and_ones():
    assert is_mask(torch.tensor([[True, False]]))
    assert is_mask(torch.tensor([[0, 1, 1]]))
    assert is_mask(torch.tensor([[0, 0]]))
    assert not is_mask(torch.tensor([0, 1]))  # labels
    assert not is_mask(torch.tensor([[0, 1, 2]]))
    assert not is_mask(torch.tensor([[0, -1]]))
    assert not is_mask(torch.tensor([[0.0, 1.0]]))  # an image in black and white is data
    assert not is_mask(torch.tensor([[0j, 1 + 0j]]))


@pytest.mark.parametrize("method", ["grape", "dp_adam", "ghost", "bookkeeping"])
def test_no_two_graphs_are_held_at_once(method):
    """Peak memory is one pass's: whatever an earlier pass has saved for its way back is gone when
    the next one begins.
    """

    saved, begun = [], []

    def loss(model, batch):
        if torch.is_grad_enabled():
            begun.append(sum(not storage.expired() for storage in saved))
        hidden = torch.tanh(model[0](batch))  # which the way back through tanh needs
        saved.append(StorageWeakRef(hidden.untyped_storage()))
        return model[1](hidden).square().sum(1)

    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
    options = {"rank": 2, "project_min_numel": 1} if method == "grape" else {}
    engine = make_engine(model, method, 1.0, **options)
    for _ in range(2):
        engine.clipped_sum(loss, torch.randn(6, 8))
    assert len(begun) >= 6
    assert begun == [0] * len(begun)
