"""Golden values, upper bounds, and the agreement of the three questions with one another."""

import math
import time

import pytest
from dp_accounting.pld import privacy_loss_distribution

from grape_ray.accounting import Mechanism, affords, epsilon, noise_multiplier, steps_within
from grape_ray.errors import BudgetExceeded


def gaussian(sampling_prob, sigma):
    return Mechanism("poisson_gaussian", sampling_prob, sigma)


@pytest.mark.parametrize(("target", "golden"), [(8.0, 0.5863), (2.0, 0.9591)])
def test_golden_noise_multipliers(target, golden):
    sigma = noise_multiplier(target, 1e-5, 0.01, 1000)
    assert golden - 5e-5 <= sigma <= golden * 1.005
    assert epsilon(gaussian(0.01, sigma), 1000, 1e-5) <= target * 1.0005
    assert affords(gaussian(0.01, sigma), 1000, target, 1e-5)
    assert not affords(gaussian(0.01, sigma * 0.995), 1000, target, 1e-5)


@pytest.mark.parametrize(
    ("target", "delta", "sampling_prob", "steps", "interval"),
    [(3.0, 1e-5, 0.05, 200, 5e-5), (1.0, 1e-5, 0.02, 50, 3e-5), (8.0, 1e-6, 0.01, 100, 2e-4),
    (3.0, 1e-5, 0.5, 50, 1e-4),
     (0.5, 1e-7, 0.1, 20, 3e-5), (3.0, 1e-6, 1e-3, 300, 1e-4)],
)  # fmt: skip
def test_noise_is_within_a_fifth_of_a_percent_of_the_least(
    target, delta, sampling_prob, steps, interval
):
    """An independent accountant's lower bound on epsilon shows that 0.2 % less noise is not enough,
    and its upper bound that this is.
    """

    def bound(sigma, above):
        one = privacy_loss_distribution.from_gaussian_mechanism(
            sigma,
            sampling_prob=sampling_prob,
            value_discretization_interval=interval,
            pessimistic_estimate=above,
            use_connect_dots=above,
        )
        return one.self_compose(steps).get_epsilon_for_delta(delta)

    sigma = noise_multiplier(target, delta, sampling_prob, steps)
    assert bound(sigma / 1.002, False) > target
    assert bound(sigma, True) <= target * 1.0001


def test_golden_epsilon_of_a_sweep():
    assert epsilon(gaussian(1e-3, 0.7876), 70_000, 1e-6) == pytest.approx(2.50, rel=0.01)


def test_never_below_a_finer_accountant():
    mechanism = gaussian(0.02, 0.8)
    finest = privacy_loss_distribution.from_gaussian_mechanism(
        0.8, sampling_prob=0.02, value_discretization_interval=2e-5
    )
    reference = finest.self_compose(500).get_epsilon_for_delta(1e-6)
    assert reference * (1 - 1e-6) <= epsilon(mechanism, 500, 1e-6) <= reference * 1.003


def test_calibration_takes_seconds():
    started = time.process_time()
    sigma = noise_multiplier(3.0, 1e-6, 1e-3, 10_000)
    assert sigma == pytest.approx(0.6075, rel=5e-4)
    assert time.process_time() - started < 20  # about 2 s on an idle core


def test_steps_that_noise_was_calibrated_for_fit():
    for sampling_prob, steps in ((0.05, 200), (1.0, 37)):
        sigma = noise_multiplier(4.0, 1e-5, sampling_prob, steps)
        mechanism = gaussian(sampling_prob, sigma)
        count = steps_within(mechanism, 4.0, 1e-5)
        assert steps <= count <= steps + 1 + steps // 500
        assert affords(mechanism, steps, 4.0, 1e-5)
        assert not affords(mechanism, math.ceil(steps * 1.01) + 1, 4.0, 1e-5)


def test_whole_batches_have_the_closed_form():
    # Balle and Wang 2018: mu = 1 and delta = Phi(1/2 - eps) - e^eps Phi(-1/2 - eps), which is 1e-5
    # at epsilon 4.3770.
    assert epsilon(gaussian(1.0, 10.0), 100, 1e-5) == pytest.approx(4.3770, abs=2e-3)
    one_step = privacy_loss_distribution.from_gaussian_mechanism(
        10.0, value_discretization_interval=1e-4
    )
    assert epsilon(gaussian(1.0, 10.0), 100, 1e-5) == pytest.approx(
        one_step.self_compose(100).get_epsilon_for_delta(1e-5), rel=1e-3
    )


def test_more_privacy_costs_more_noise():
    assert (
        noise_multiplier(1.0, 1e-5, 0.1, 50)
        > noise_multiplier(2.0, 1e-5, 0.1, 50)
        > noise_multiplier(2.0, 1e-4, 0.1, 50)
    )


def test_a_budget_without_a_step():
    assert steps_within(gaussian(1.0, 0.5), 1.0, 1e-5) == 0
    assert steps_within(gaussian(0.5, 0.5), 1.0, 1e-5) == 0


def test_long_runs_are_counted_up_to_the_limit():
    assert steps_within(gaussian(1.0, 1e5), 8.0, 1e-5) == 10**6


def test_no_noise_is_enough():
    with pytest.raises(BudgetExceeded, match="large enough"):
        noise_multiplier(1e-6, 1e-11, 1.0, 10**6)


def test_much_noise_costs_nothing_at_a_large_delta():
    assert epsilon(gaussian(1.0, 100.0), 1, 0.5) == 0.0
