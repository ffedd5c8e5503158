"""A one-step canary audit of the real path: it measures mu = 1 / noise_multiplier, and it catches
planted bugs.

At sampling probability 1 the step is a Gaussian mechanism. The canary's clipped gradient has norm C
along one direction; the release is projected on it with and without the canary, many times with
fresh keys. Between two Gaussians of equal spread, mu is the distance of the means in units of the
spread.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from grape_ray import make_engine
from grape_ray.privacy.noise import NoiseStream, privatize
from tests.support.grants import granted

SIGMA, CLIP, EXPECTED = 2.0, 1.0, 8.0
# the spread is known to 0.9 % and 2.5 %: 0.02 is 4.3, and 0.1 at least 6, standard errors; false
# alarms < 1e-4
TRIALS, FEW = 6000, 800


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def loss(model, batch):
    return model(batch["x"]).flatten(1).pow(2).sum(1)


def sums(method, break_clip=False, crowd=False):
    torch.manual_seed(0)
    model = Model()
    data = {"x": torch.randn(9, 3, 8)}
    data["x"][0] *= 40  # the canary
    if crowd:  # all others are like it
        data["x"][1:] = data["x"][0]
    engine = make_engine(model, method, CLIP, key=b"audit", rank=2, project_min_numel=32)
    if break_clip:  # planted: each tensor clipped to C, counted as one flat clip
        engine.clipping, engine.clip_norm = "per_layer", CLIP * math.sqrt(len(engine.params))
    inside = engine.clipped_sum(loss, data)
    without = engine.clipped_sum(loss, {"x": data["x"][1:]})
    return inside, without


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def measure(release, inside, without, trials=TRIALS):
    """mu of the mechanism along the canary's direction: a shift that is exact under common noise,
    over the noise's spread.
    """
    direction = flat(inside.tensors) - flat(without.tensors)
    direction = direction / direction.norm()

    def seen(summed, present, trial):
        copy = type(summed)({n: t.clone() for n, t in summed.tensors.items()}, CLIP)
        return float(release(copy, present, trial).double() @ direction.double())

    shift = np.mean([seen(inside, True, t) - seen(without, False, t) for t in range(50)])
    return shift / np.std([seen(inside, True, t) for t in range(trials)], ddof=1)


def release_of(summed, trial, noise_multiplier=SIGMA, label=b"audit"):
    key = label.ljust(24, b".") + trial.to_bytes(8, "big")
    released = privatize(
        summed,
        NoiseStream(key),
        step=0,
        grant=granted(noise_multiplier),
        expected_batch_size=EXPECTED,
    )
    return flat(released.tensors)


def honest(summed, present, trial):
    return release_of(summed, trial)


@pytest.mark.statistical
@pytest.mark.parametrize("method", ["grape", "dp_adam"])
def test_the_real_step_has_the_mu_that_is_paid_for(method):
    assert measure(honest, *sums(method)) == pytest.approx(1 / SIGMA, abs=0.02)


@pytest.mark.statistical
@pytest.mark.parametrize("workers", [2, 4])
def test_noise_divided_by_the_number_of_workers_is_caught(workers):
    assert (
        measure(lambda s, _, t: release_of(s, t, SIGMA / workers), *sums("grape"), FEW)
        > 1 / SIGMA + 0.1
    )


@pytest.mark.statistical
def test_clipping_each_layer_to_the_flat_bound_is_caught():
    assert measure(honest, *sums("grape", break_clip=True), FEW) > 1 / SIGMA + 0.1


@pytest.mark.statistical
def test_the_mean_over_the_realised_batch_is_caught():
    inside, without = sums("grape", crowd=True)  # one more of the same does not move a mean at all
    assert measure(honest, inside, without, FEW) == pytest.approx(1 / SIGMA, abs=0.1)
    assert (
        measure(
            lambda s, present, t: release_of(s, t) * (EXPECTED / (9 if present else 8)),
            inside,
            without,
            FEW,
        )
        < 0.1
    )


@pytest.mark.statistical
def test_noise_for_every_micro_batch_is_caught():
    def release(summed, present, trial):
        nothing = type(summed)({n: torch.zeros_like(t) for n, t in summed.tensors.items()}, CLIP)
        return release_of(summed, trial) + release_of(nothing, trial, label=b"second")

    assert measure(release, *sums("grape"), FEW) < 1 / SIGMA - 0.1
