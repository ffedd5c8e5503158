"""Epsilon is never below the truth, however small delta: the truth comes from an integral that has
no grid of losses and no convolution.
"""

import math

import numpy as np
import pytest
from scipy.stats import norm

from grape_ray.accounting import Mechanism, affords, epsilon
from grape_ray.accounting.composition import _TILTS, Composition, _power
from grape_ray.accounting.losses import Losses, connected, gaussian


def log_moments(s, sigma, q) -> np.ndarray:
    """log E e^(s L) of one removal's loss L, at complex s (n,): the trapezoidal rule, which for
    such densities is exact to rounding.
    """
    t = np.linspace(-12 * sigma, 1 + 12 * sigma + s.real.max(), 3000)
    density = -(t**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    loss = np.logaddexp(math.log1p(-q), math.log(q) + (2 * t - 1) / (2 * sigma**2))
    found = []
    for one in s:
        exponent = density + (1 + one) * loss
        top = exponent.real.max()
        found.append(top + np.log(np.exp(exponent - top).sum() * (t[1] - t[0])))
    return np.array(found, dtype=np.complex128)


def true_delta(sigma, q, steps, level):
    """delta = 1 / (2 pi i) times the integral of M(s)^T e^(-s level) / (s (s + 1)) along a line
    through the saddle point.
    """
    thetas = np.geomspace(0.05, 100, 150)
    exponents = (
        np.real(steps * log_moments(thetas + 0j, sigma, q))
        - thetas * level
        - np.log(thetas * (1 + thetas))
    )
    theta = thetas[np.argmin(exponents)]
    around = np.real(steps * log_moments(np.array([0.98, 1.0, 1.02]) * theta + 0j, sigma, q))
    spread = math.sqrt((around[2] - 2 * around[1] + around[0]) / (0.02 * theta) ** 2)
    u = np.arange(0, 40 / spread, 1 / (6 * spread + 6 / theta))
    s = theta + 1j * u
    logs = steps * log_moments(s, sigma, q)
    assert logs[-1].real < logs[0].real - 25  # the integrand has died away
    values = (np.exp(logs - logs[0].real - 1j * u * level) / (s * (s + 1))).real
    return math.exp(logs[0].real - theta * level) * (values.sum() - values[0] / 2) * u[1] / math.pi


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta", "truth"),
    [(0.6, 0.02, 3000, 1e-11, 39.517390), (0.6, 0.02, 3000, 1e-8, None),
    (1.0, 0.01, 10_000, 1e-11, None),
     (2.0, 0.1, 1000, 1e-10, None), (5.0, 0.5, 300, 1e-11, None), (0.4, 0.01, 2000, 1e-11, None),
     (0.8, 0.02, 500, 1e-6, 5.4403062), (20.0, 0.05, 10**6, 1e-9, None)],
)  # fmt: skip
def test_epsilon_is_above_the_truth_and_near_it(sigma, q, steps, delta, truth):
    mechanism = Mechanism("poisson_gaussian", q, sigma)
    found = epsilon(mechanism, steps, delta)
    assert (
        true_delta(sigma, q, steps, found)
        <= delta
        <= true_delta(sigma, q, steps, found * (1 - 5e-4))
    )
    assert affords(mechanism, steps, found * (1 + 1e-6), delta)
    assert not affords(mechanism, steps, found * (1 - 1e-3), delta)
    if truth:
        assert truth * (1 - 1e-8) <= found <= truth * 1.0005


def test_rare_large_losses_are_told_apart_from_the_rounding_of_one_convolution():
    """Their sum has no saddle point to speak of, and the error bound in double precision is a good
    part of delta.
    """
    composed = Composition(gaussian(1.0, 1e-5, 1e-5)[0], 100_000)
    theta = composed._tilt(np.full_like(_TILTS, -math.log(1e-11)), divide=True)
    double = composed._tilted(theta)
    blurred = composed._least(double, 1e-11)
    assert composed._blurred(double, blurred)
    assert composed.epsilon(1e-11) == pytest.approx(0.02463, abs=1e-5)
    assert blurred > 0.04
    assert composed.delta(0.0247) <= 1e-11 <= composed.delta(0.0245)


def test_the_convolution_is_within_its_bound():
    losses = gaussian(0.8, 0.05, 1e-3)[0]
    composed = Composition(losses, 37)
    for theta in (0.0, 2.0, 20.0):
        double, long = (composed._tilted(theta, dtype) for dtype in (np.float64, np.longdouble))
        assert np.linalg.norm(double.cells - long.cells) <= double.off + long.off
        assert double.cells.sum() == pytest.approx(1, abs=1e-12)
    z = np.exp(1j * np.linspace(0, 3, 50))
    assert _power(z, 1_000_003) == pytest.approx(np.exp(1_000_003j * np.angle(z)), abs=1e-9)


@pytest.mark.parametrize(
    ("sigma", "q"), [(0.1, 0.5), (0.3, 1e-6), (0.6, 0.02), (1.0, 0.999), (50.0, 0.3)]
)
@pytest.mark.parametrize("spacing", [1e-3, 1e-2])
def test_one_steps_losses_dominate_the_mechanism_in_both_directions(sigma, q, spacing):
    for losses, sign in zip(gaussian(sigma, q, spacing), (1, -1)):
        assert (losses.probs >= 0).all()
        assert 1 - 1e-13 <= losses.probs.sum() + losses.infinite <= 1 + 1e-9
        x = (losses.lower + np.arange(len(losses.probs))) * spacing
        for level in np.quantile(x, [0.05, 0.3, 0.5, 0.7]) + spacing / 3:
            bound = losses.infinite + float(
                (losses.probs * -np.expm1(np.minimum(level - x, 0.0))).sum()
            )
            argument = math.exp(min(sign * level, 700.0)) - 1 + q
            if argument <= 0:
                continue
            t = sigma**2 * math.log(argument / q) + 0.5
            mixed = (1 - q) * norm.sf(t / sigma) + q * norm.sf((t - 1) / sigma)
            if sign > 0:
                exact = mixed - math.exp(level) * norm.sf(t / sigma)
            else:
                exact = norm.cdf(t / sigma) - math.exp(level) * (
                    (1 - q) * norm.cdf(t / sigma) + q * norm.cdf((t - 1) / sigma)
                )
            assert exact <= bound + 1e-15


def test_a_profile_is_reached_at_every_cell_whatever_its_differences_lose():
    x = np.arange(-3000, 6000) * 1e-4
    deltas = norm.sf(x - 0.5) - np.exp(x) * norm.sf(x + 0.5)  # noise 1
    losses = connected(-3000, 1e-4, np.minimum.accumulate(np.clip(deltas, 0, 1)))
    for cell in (0, 10, 3000, 8000):
        over = x[cell + 1 :] - x[cell]
        reached = losses.infinite + math.fsum(losses.probs[cell + 1 :] * -np.expm1(-over))
        assert deltas[cell] <= reached <= deltas[cell] + 1e-9


def test_what_no_float_covers_is_not_promised():
    certain = Losses(0, 1e-3, np.array([0.5, 0.5]), 1e-9)
    assert Composition(certain, 100).epsilon(1e-8) == math.inf
    assert Composition(certain, 100).delta(5.0) >= 1e-7 * (1 - 1e-6)
    assert Composition(Losses(0, 1e-3, np.array([1.0]), 0.0), 100).epsilon(1e-8) == 0.0


def test_epsilons_of_many_thousands_have_chernoffs_bound():
    found = Composition(gaussian(0.02, 0.9, 1e-2)[0], 10**6).epsilon(1e-6)
    assert 1e8 < found < 1e10
