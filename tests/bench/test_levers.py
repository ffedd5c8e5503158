"""The network that is written out by hand is the one that the engines clip; a lever's effect is a
difference with the same seeds.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grape_ray.bench import levers
from grape_ray.bench.levers import BASE, Embedded, Setting, accuracy, effects
from grape_ray.engines import make_engine


@pytest.mark.parametrize("clipping", ["automatic", "flat"])
def test_its_clipped_sums_are_those_of_bookkeeping(clipping):
    gauss = torch.Generator().manual_seed(0)
    params = levers._begin(12, 3, gauss)
    model = nn.Sequential(nn.Linear(12, params[0].shape[0]), nn.GELU(), nn.Linear(256, 3))
    with torch.no_grad():
        for mine, theirs in zip(params, model.parameters()):
            theirs.copy_(mine)
    x, labels = torch.randn(9, 12, generator=gauss), torch.arange(9) % 3
    lever = replace(BASE, rank=0, clipping=clipping, clip_norm=0.5)
    found = levers._clipped_sums(params, x, labels, None, lever)

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    engine = make_engine(model, "bookkeeping", 0.5, clipping=clipping)
    wanted = engine.clipped_sum(loss, {"x": x, "y": labels}).tensors
    for mine, theirs in zip(found, wanted.values()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def _separable(count: int) -> Embedded:
    gauss = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 3
    x = torch.randn(count, 16, generator=gauss) + 3 * F.one_hot(labels, 16)
    half = count // 2
    return Embedded(x[:half], labels[:half], x[half::2], x[half + 1 :: 2], labels[half + 1 :: 2])


def test_every_lever_learns_what_is_plain_to_see():
    data, setting = _separable(4000), Setting(epsilon=8, batch=500, steps=20)
    for lever in (BASE, *levers.LEVERS):
        fits = replace(lever, rank=min(lever.rank, 8))
        assert accuracy(data, setting, fits, lever.rates[-1], 0) > 0.6, lever.name


def test_an_effect_is_a_difference_with_the_same_seeds(monkeypatch):
    monkeypatch.setattr(levers, "LEVERS", (replace(BASE, name="again"),))
    first, again = effects(_separable(400), Setting(batch=50, steps=3), seeds=3)
    assert first.accuracy == again.accuracy
    assert (again.difference, again.error) == (0, 0)
