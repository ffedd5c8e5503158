"""Every number is checked before an accountant sees it."""

import math
import pickle

import numpy as np
import pytest

from grape_ray.accounting import Mechanism, affords, epsilon, noise_multiplier, steps_within
from grape_ray.accounting.mechanism import check_count
from grape_ray.errors import ConfigError

GOOD = Mechanism("poisson_gaussian", 1.0, 2.0)
NOT_NUMBERS = [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300, 10**400, "1", None, True]


@pytest.mark.parametrize("bad", NOT_NUMBERS)
def test_bad_numbers_never_reach_the_accountant(bad):
    calls = [
        lambda: Mechanism("poisson_gaussian", bad, 1.0),
        lambda: Mechanism("poisson_gaussian", 0.5, bad),
        lambda: epsilon(GOOD, 10, bad),
        lambda: noise_multiplier(bad, 1e-5, 0.1, 10),
        lambda: noise_multiplier(1.0, bad, 0.1, 10),
        lambda: noise_multiplier(1.0, 1e-5, bad, 10),
        lambda: steps_within(GOOD, bad, 1e-5),
        lambda: steps_within(GOOD, 1.0, bad),
        lambda: affords(GOOD, 10, bad, 1e-5),
        lambda: epsilon(GOOD, bad, 1e-5),
    ]
    for call in calls:
        with pytest.raises(ConfigError):
            call()


@pytest.mark.parametrize("steps", [0, -1, 1.0, True, 10**9, "3", None, math.nan])
def test_steps_are_positive_integers(steps):
    with pytest.raises(ConfigError, match="steps"):
        epsilon(GOOD, steps, 1e-5)


def test_numpy_integers_are_counts():
    assert check_count("steps", np.int64(3)) == 3


@pytest.mark.parametrize("delta", [1e-12, 1.0, 2.0])
def test_delta_stays_where_the_numerics_hold(delta):
    with pytest.raises(ConfigError, match="delta"):
        epsilon(GOOD, 10, delta)


@pytest.mark.parametrize(
    ("name", "probes", "shared"),
    [
        ("gaussian", 0, False),
        ("poisson_gaussian", 8, False),
        ("poisson_gaussian", 0, True),
        ("poisson_randomized", 0, False),
    ],
)
def test_probes_go_with_the_mechanism(name, probes, shared):
    with pytest.raises(ConfigError):
        Mechanism(name, 0.1, 1.0, probes, shared)


def test_errors_survive_a_process_boundary():
    with pytest.raises(ConfigError) as caught:
        Mechanism("poisson_gaussian", 2.0, 1.0)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
