"""The accountant of randomized clipping: golden values, and the inequalities that its proofs rest
on.
"""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.special import ndtr
from scipy.stats import norm

from grape_ray.accounting import Mechanism, epsilon, noise_multiplier
from grape_ray.accounting.randomized import _mean_delta, _threshold_tests, worst_estimate
from grape_ray.cli.main import main

RANDOMIZED = "poisson_randomized"
# (probes, epsilon): noise multipliers for shared and for secret probes, at delta 1e-5, q = 0.01,
# 1000 steps.
GOLDEN = {
    (8, 8.0): (1.668, 1.167),
    (32, 8.0): (0.6666, 0.6218),
    (32, 2.0): (1.0757, 0.9996),
    (128, 2.0): (0.9794, 0.9686),
}


@pytest.mark.parametrize(("probes", "target"), GOLDEN)
def test_golden_noise_multipliers(probes, target):
    for shared, golden in zip((True, False), GOLDEN[probes, target]):
        sigma = noise_multiplier(
            target, 1e-5, 0.01, 1000, method=RANDOMIZED, probes=probes, probes_shared=shared
        )
        assert golden * 0.9995 <= sigma <= golden * 1.005


def test_secret_probes_cost_less_than_shared_and_more_than_exact_norms():
    for q, sigma, probes in ((1.0, 2.0, 16), (0.1, 1.0, 16), (0.01, 0.7, 64), (0.1, 0.3, 4)):
        exact = epsilon(Mechanism("poisson_gaussian", q, sigma), 10, 1e-5)
        secret, shared = (
            epsilon(Mechanism(RANDOMIZED, q, sigma, probes, s), 10, 1e-5) for s in (False, True)
        )
        assert exact < secret * 1.0005
        assert secret <= shared * 1.0005


def test_many_probes_approach_exact_norms():
    exact = epsilon(Mechanism("poisson_gaussian", 0.1, 1.0), 10, 1e-5)
    assert epsilon(Mechanism(RANDOMIZED, 0.1, 1.0, 100_000, True), 10, 1e-5) == pytest.approx(
        exact, rel=5e-3
    )


@pytest.mark.parametrize("probes", [1, 8, 32, 1000])
def test_the_nodes_dominate_the_estimate_in_the_convex_order(probes):
    nodes, weights = worst_estimate(probes)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert weights.min() >= 0
    assert weights @ nodes == pytest.approx(1, abs=1e-9)
    rng = np.random.default_rng(0)
    draws = rng.chisquare(probes, 400_000) / probes
    for bend in (0.2, 0.7, 1.0, 1.5):  # hinges span the convex decreasing functions
        sample = np.maximum(bend - draws, 0)
        assert weights @ np.maximum(bend - nodes, 0) >= sample.mean() - 5 * sample.std() / 632


@pytest.mark.statistical  # five standard errors: a false alarm in 10^6
@pytest.mark.parametrize("spectrum", [[1.0], [0.5, 0.5], [0.9, 0.1], [0.25] * 4])
@pytest.mark.parametrize("independent", [True, False])
def test_no_gradients_spectrum_beats_the_worst_case(spectrum, independent):
    """Real Hutchinson estimates of matrices of unit norm, against the bounds on tests (secret) and
    on delta (shared).
    """
    probes, sigma, samples = 8, 1.2, 200_000
    rng = np.random.default_rng(1)
    if independent:
        draws = rng.chisquare(probes, (samples, len(spectrum))) / probes
    else:  # one draw of probes used for every singular direction, as for layers that share them
        draws = np.repeat(rng.chisquare(probes, (samples, 1)) / probes, len(spectrum), axis=1)
    shift = (draws @ np.array(spectrum)) ** -0.5 / sigma
    nodes, weights = worst_estimate(probes)
    thresholds = np.array([-1.0, 0.0, 1.0, 2.0, 3.0, 4.0])
    power, miss, _ = _threshold_tests(thresholds, nodes, weights, sigma)
    assert power + miss == pytest.approx(1.0, abs=1e-9)
    for t, bound in zip(thresholds, power):
        sample = ndtr(shift - t)
        assert sample.mean() <= bound + 5 * sample.std() / samples**0.5
    levels = np.array([-1.0, 0.0, 1.0, 2.0, 4.0])
    for e, bound in zip(levels, _mean_delta(levels, nodes, weights, sigma)):
        sample = ndtr(shift / 2 - e / shift) - np.exp(e) * ndtr(-shift / 2 - e / shift)
        assert sample.mean() <= bound + 5 * sample.std() / samples**0.5


@pytest.mark.statistical
def test_a_hutchinson_estimate_has_the_claimed_law():
    """||A^T G P||^2 over ||A^T G||^2 is a chi2_k / k of the spectrum's mixture: mean 1, variance 2
    sum(lambda^2) / k.
    """
    rng = np.random.default_rng(2)
    gradient, probes = rng.normal(size=(5, 7)), 8
    spectrum = np.linalg.svd(gradient, compute_uv=False) ** 2
    spectrum /= spectrum.sum()
    estimates = ((gradient @ rng.normal(size=(20_000, 7, probes)) / probes**0.5) ** 2).sum(
        (1, 2)
    ) / (gradient**2).sum()
    variance = 2 * (spectrum**2).sum() / probes
    assert estimates.mean() == pytest.approx(1, abs=5 * (variance / 20_000) ** 0.5)
    assert estimates.var() == pytest.approx(variance, rel=0.08)


def test_the_density_ratio_belongs_to_the_power():
    nodes, weights = worst_estimate(16)
    t = np.linspace(-1, 4, 11)
    step = 1e-5
    up, down = (_threshold_tests(t + s, nodes, weights, 1.0)[0] for s in (step, -step))
    ratio = _threshold_tests(t, nodes, weights, 1.0)[2]
    assert -(up - down) / (2 * step) / norm.pdf(t) == pytest.approx(ratio, rel=1e-5)


def test_the_command_line_knows_it():
    arguments = [
        "account",
        "--epsilon",
        "4",
        "--delta",
        "1e-5",
        "--sampling-prob",
        "0.05",
        "--steps",
        "20",
        "--method",
        "randomized",
    ]
    result = CliRunner().invoke(main, [*arguments, "--probes", "16", "--json"])
    assert result.exit_code == 0, result.stderr
    fields = json.loads(result.stdout.splitlines()[-1])
    assert (fields["mechanism"], fields["probes"], fields["probes_shared"]) == (
        RANDOMIZED,
        16,
        False,
    )
