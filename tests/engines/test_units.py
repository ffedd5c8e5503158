"""Several rows that are one unit's: averaged, then clipped, exactly, by every method."""

import pytest
import torch
from torch import nn

from grape_ray import make_engine
from grape_ray.errors import ConfigError
from tests.support import zoo
from tests.support.methods import EXACT, GRADIENT, PRIVATE
from tests.support.oracle import averages, clipped, norm_of, worst

CLIP = 0.37
ROWS = 7
# a unit of three rows that are not neighbours, one of two, none, and two of one
RAGGED = torch.tensor([0, 1, 0, 4, 1, 0, 3])
EVEN = torch.tensor([0, 0, 1, 1, 2, 2])  # neighbours, equally many: nothing has to be moved
CASES = {"ragged": (RAGGED, 5), "even": (EVEN, 3), "one each": (torch.arange(ROWS), ROWS)}


def engine_for(model, method, clip_norm=CLIP, **options):
    return make_engine(
        model, method, clip_norm, key=b"units", rank=3, project_min_numel=100, **options
    )


def middle(units):
    norms = sorted(map(norm_of, units))
    return norms[(len(norms) - 1) // 2] * 1.001


def check(model, loss, batch, method, case, **options):
    groups, units = CASES[case]
    batch = {name: tensor[: len(groups)] for name, tensor in batch.items()}
    wanted = averages(engine_for(model, method, **options), loss, batch, groups)
    engine = engine_for(model, method, middle(wanted), **options)
    summed = engine.clipped_sum(loss, batch, groups=groups, units=units)
    reference = clipped(wanted, engine.clip_norm, engine.clipping)
    assert worst(summed.tensors, reference) < 1e-7  # T5 computes its norms in fp32
    assert summed.unprotected["norms"].shape == (units,)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("method", EXACT)
def test_units_are_averaged_and_then_clipped(method, clipping, case):
    batch = zoo.layer_batch(rows=ROWS)
    check(zoo.build_layer("bare parameters"), zoo.layer_loss, batch, method, case,
          clipping=clipping)  # fmt: skip


@pytest.mark.parametrize("family", ["OPT (tied)", "ViT", "T5", "LoRA on GPT-2"])
@pytest.mark.parametrize("method", EXACT)
def test_units_of_whole_models(method, family):
    model, loss, make_batch = zoo.build_family(family)
    check(model, loss, make_batch(rows=ROWS), method, "ragged")


@pytest.mark.parametrize("route", ["gram", "instantiate"])
@pytest.mark.parametrize("method", ["ghost", "bookkeeping"])
def test_units_by_either_norm(method, route):
    model, loss, make_batch = zoo.build_family("GPT-2 (tied)")
    check(model, loss, make_batch(rows=ROWS), method, "ragged", routes=(f"*:{route}",))


@pytest.mark.parametrize(
    "layer", ["LSTM, two layers, both ways, projected, time-major", "weight norm (computed weight)",
              "einsum (vmap)", "reused module", "Conv2d"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["grape", "ghost"])
def test_units_of_other_layers(method, layer):
    batch = zoo.layer_batch(rows=ROWS)
    check(zoo.build_layer(layer), zoo.layer_loss, batch, method, "ragged")


@pytest.mark.parametrize("method", EXACT)
def test_units_of_one_row_each_are_examples(method):
    model, batch = zoo.build_layer("bare parameters"), zoo.layer_batch(rows=ROWS)
    plain = engine_for(model, method).clipped_sum(zoo.layer_loss, batch)
    groups = torch.arange(ROWS)
    summed = engine_for(model, method).clipped_sum(zoo.layer_loss, batch, groups=groups, units=ROWS)
    assert worst(summed.tensors, plain.tensors) == 0


def sized(*sizes):
    """(groups, units) of units with so many rows each, their rows in a random order."""
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
    return groups[order], len(sizes)


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("method", PRIVATE)
def test_one_unit_with_all_its_rows_moves_the_sum_by_at_most_the_clip_norm(method, clipping):
    if method == "randomized" and clipping != "flat":
        pytest.skip("its accountant covers flat clipping alone")
    model = zoo.build_layer("bare parameters")  # narrow, so that every norm is computed
    groups, units = sized(1, 2, 0, 5, 50)
    batch = {"x": 30 * zoo.layer_batch(rows=len(groups))["x"]}
    engine = engine_for(model, method, clipping=clipping)
    whole = engine.clipped_sum(zoo.layer_loss, batch, groups=groups, units=units).tensors
    for unit in range(units):
        rest = groups != unit
        without = engine.clipped_sum(
            zoo.layer_loss, {"x": batch["x"][rest]}, groups=groups[rest], units=units
        ).tensors
        moved = norm_of({name: whole[name] - without[name] for name in whole})
        assert moved <= CLIP * (1 + 1e-6)
        assert (moved > 0.9 * CLIP) == (unit != 2)  # all are clipped, and the empty one is nothing


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("method", PRIVATE)
def test_one_row_that_is_not_finite_takes_its_unit_out_and_no_other(method, bad):
    model = zoo.build_layer("LayerNorm without bias").float()
    batch = {"x": zoo.layer_batch(rows=ROWS)["x"].float()}
    rest = RAGGED != 0
    clean = engine_for(model, method).clipped_sum(
        zoo.layer_loss, {"x": batch["x"][rest]}, groups=RAGGED[rest], units=5
    )
    batch["x"][2] = bad  # of unit 0
    engine = engine_for(model, method)
    spoiled = engine.clipped_sum(zoo.layer_loss, batch, groups=RAGGED, units=5).tensors
    assert all(torch.isfinite(t).all() for t in spoiled.values())
    assert norm_of({n: spoiled[n] - t for n, t in clean.tensors.items()}) <= CLIP * (1 + 1e-5)
    if bad != 1e30:
        assert worst(spoiled, clean.tensors) < 1e-4


@pytest.mark.parametrize("method", [*EXACT, "none"])
def test_padding_units_and_micro_batches_change_nothing(method):
    model, loss, make_batch = zoo.build_family("OPT (tied)")
    batch = make_batch(rows=ROWS)
    engine = engine_for(model, method)
    whole = engine.clipped_sum(loss, batch, groups=RAGGED, units=5).tensors
    padded = {name: torch.cat([tensor, tensor[:3]]) for name, tensor in batch.items()}
    groups, mask = torch.cat([RAGGED, torch.tensor([5, 5, 6])]), torch.arange(7) < 5
    assert worst(engine.clipped_sum(loss, padded, mask=mask, groups=groups, units=7).tensors,
                 whole) < 1e-9  # fmt: skip
    parts = [(unit == RAGGED).nonzero()[:, 0] for unit in RAGGED.unique()]
    sums = [
        engine.clipped_sum(
            loss,
            {name: tensor[rows] for name, tensor in batch.items()},
            groups=torch.zeros(len(rows), dtype=torch.int64),
            units=1,
        )
        for rows in parts
    ]
    total = sums[0]
    for part in sums[1:]:
        total = total + part
    assert worst(total.tensors, whole) < 1e-9


class Dictated(nn.Module):
    """One linear layer whose output gradients are dictated: the loss is sum(layer(x) * grads)."""

    def __init__(self, inputs=64, outputs=64):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(inputs, outputs, bias=False)

    def forward(self, batch):
        return (self.layer(batch["x"]) * batch["g"]).flatten(1).sum(1).float()


def dictated(model, batch):
    return model(batch)


def dictated_in_bf16(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return model(batch)


@pytest.mark.parametrize("loss", [dictated, dictated_in_bf16])
@pytest.mark.parametrize("size", [1.0, 1e5, 1e8])
@pytest.mark.parametrize("method", GRADIENT)
def test_records_that_cancel_hide_no_contribution(method, size, loss):
    """The norm of an average is an upper bound where its records' gradients all but cancel."""
    generator = torch.Generator().manual_seed(1)
    x = size * torch.randn(1, 2, 64, generator=generator).expand(4, -1, -1)
    x = x + torch.randn(4, 2, 64, generator=generator)
    g = torch.randn(1, 2, 64, generator=generator) * torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1)
    engine = engine_for(Dictated(), method, 1.0)
    groups = torch.tensor([0, 0, 1, 1])
    for unit in (0, 1):
        batch = {"x": x[groups == unit], "g": g[groups == unit]}
        summed = engine.clipped_sum(loss, batch, groups=torch.tensor([0, 0]), units=1)
        assert norm_of(summed.tensors) <= 1 + 1e-3


def test_estimated_norms_of_units_estimate_the_average():
    model, batch = Dictated(), None
    generator = torch.Generator().manual_seed(2)
    batch = {key: torch.randn(ROWS, 2, 64, generator=generator) for key in "xg"}
    wanted = averages(make_engine(model, "dp_adam", 1.0), dictated, batch, RAGGED)
    engine = make_engine(model, "randomized", 1.0, probes=4096, routes=("*:sketch",))
    summed = engine.clipped_sum(dictated, batch, groups=RAGGED, units=5)
    assert worst(summed.tensors, clipped(wanted, 1.0)) < 0.1


@pytest.mark.parametrize(
    ("groups", "units"),
    [(RAGGED, None), (RAGGED, 4), (RAGGED - 1, 5), (RAGGED[:3], 5), (RAGGED.int(), 5)],
)
@pytest.mark.parametrize("method", ["grape", "none"])
def test_other_groups_are_refused(method, groups, units):
    engine = engine_for(zoo.build_layer("Linear"), method)
    with pytest.raises(ConfigError, match="groups, got 'torch"):
        engine.clipped_sum(zoo.layer_loss, zoo.layer_batch(rows=ROWS), groups=groups, units=units)
    with pytest.raises(ConfigError, match="mask, got"):
        engine_for(zoo.build_layer("Linear"), "grape").clipped_sum(
            zoo.layer_loss, zoo.layer_batch(rows=ROWS), groups=RAGGED, units=5,
            mask=torch.ones(ROWS, dtype=torch.bool),
        )  # fmt: skip
