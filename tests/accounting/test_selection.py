"""Private selection: golden costs, the distribution of the number of trials, and what the ledger
makes of it.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from grape_ray.accounting import Mechanism
from grape_ray.accounting.selection import (
    NEGATIVE_BINOMIAL,
    POISSON,
    Distribution,
    Selection,
    epsilon,
    noise_multiplier,
)
from grape_ray.errors import BudgetExceeded, ConfigError, LedgerError
from grape_ray.ledger import Ledger, Study, verify

STEP = Mechanism("poisson_gaussian", 1e-3, 0.7876)
LOGARITHMIC = Distribution(NEGATIVE_BINOMIAL, 20.0)
PAID = Selection(
    "sel",
    Mechanism("poisson_gaussian", 1.0, 30.0),
    3.0,
    1e-6,
    20,
    Distribution(NEGATIVE_BINOMIAL, 5.0),
)
DISTRIBUTIONS = [
    LOGARITHMIC,
    Distribution(NEGATIVE_BINOMIAL, 20.0, 1.0),
    Distribution(NEGATIVE_BINOMIAL, 3.0, 0.5),
    Distribution(NEGATIVE_BINOMIAL, 50.0, 7.0),
    Distribution(POISSON, 20.0),
]


def test_golden_costs_of_selection():
    assert epsilon(STEP, 10_000, LOGARITHMIC, 1e-6) == pytest.approx(2.95, rel=0.01)
    assert epsilon(STEP, 10_000, replace(LOGARITHMIC, shape=1.0), 1e-6) == pytest.approx(
        3.296, rel=0.01
    )
    assert epsilon(STEP, 10_000, Distribution(POISSON, 20.0), 1e-6) == pytest.approx(
        3.443, rel=0.01
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_the_distribution_has_its_mean_and_sums_to_one(distribution):
    masses = distribution.probabilities(5000)
    assert math.fsum(masses) == pytest.approx(1, abs=1e-6)
    assert math.fsum(k * m for k, m in enumerate(masses)) == pytest.approx(
        distribution.mean, rel=1e-5
    )
    assert (masses[0] == 0) == (distribution.name == NEGATIVE_BINOMIAL)


def test_the_geometric_distribution_is_one():
    masses = Distribution(NEGATIVE_BINOMIAL, 4.0, 1.0).probabilities(30)
    assert masses[1:] == pytest.approx([0.25 * 0.75 ** (k - 1) for k in range(1, 31)])


@pytest.mark.statistical
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_draws_follow_the_distribution(distribution, monkeypatch):
    # Pinned draws of 4,000: Kolmogorov's distance exceeds 0.026 with probability 0.9 % under the
    # distribution; half the mean is found.
    generator = np.random.default_rng(7)
    monkeypatch.setattr("secrets.randbits", lambda bits: int(generator.integers(0, 2**bits)))
    drawn = (
        np.bincount([distribution.draw() for _ in range(4000)], minlength=900)[:900].cumsum() / 4000
    )

    def distance(other):
        return np.abs(drawn - np.cumsum(other.probabilities(899))).max()

    assert distance(distribution) < 0.026
    assert (
        distance(
            replace(distribution, mean=distribution.mean / 2 if distribution.mean > 2 else 4.0)
        )
        > 0.026
    )


NO_LAWS = [
    ("x", 20.0), (NEGATIVE_BINOMIAL, 1.0), (POISSON, 0.5), (NEGATIVE_BINOMIAL, math.nan),
    (NEGATIVE_BINOMIAL, 5.0, -0.5), (POISSON, 5.0, 1.0), (POISSON, 501.0), (NEGATIVE_BINOMIAL, 1e6),
    (NEGATIVE_BINOMIAL, 5.0, math.inf),
]  # fmt: skip


@pytest.mark.parametrize("fields", NO_LAWS)
def test_other_distributions_are_refused(fields):
    with pytest.raises(ConfigError):
        Distribution(*fields)


def test_noise_is_calibrated_to_the_selection():
    sigma = noise_multiplier(3.0, 1e-6, 1e-3, 10_000, LOGARITHMIC)
    assert 0.95 * 0.7876 < sigma < 0.7876
    quiet = Mechanism("poisson_gaussian", 1e-3, sigma)
    assert 2.99 < epsilon(quiet, 10_000, LOGARITHMIC, 1e-6) <= 3.0
    with pytest.raises(BudgetExceeded):
        noise_multiplier(1e-6, 1e-11, 1.0, 10**6, LOGARITHMIC)


def test_estimated_norms_have_no_renyi_bound():
    with pytest.raises(ConfigError, match="exact norms"):
        epsilon(Mechanism("poisson_randomized", 0.1, 1.0, 8), 10, LOGARITHMIC, 1e-6)


def test_the_ledger_takes_the_whole_cost_first(tmp_path):
    ledger = Ledger.open(str(tmp_path / "l"), "data", 4.0, 1e-5)
    ledger.ensure_selection(PAID)
    ledger.ensure_selection(PAID)
    assert ledger.state.next_seq == 2
    assert Ledger.open(str(tmp_path / "l")).state.selections == {"sel": PAID}
    with pytest.raises(BudgetExceeded, match="costs too much"):
        ledger.ensure_study(Study("s", PAID.mechanism, 1.01, 1e-6, 5))
    with pytest.raises(LedgerError, match="registered twice"):
        ledger.ensure_study(Study("sel", PAID.mechanism, 0.9, 1e-6, 5))
    with pytest.raises(BudgetExceeded, match="does not buy"):
        ledger.ensure_selection(replace(PAID, name="t", epsilon=0.1))
    with pytest.raises(LedgerError, match="differently"):
        ledger.ensure_selection(replace(PAID, trial_tokens=21))
    with pytest.raises(LedgerError, match="no such study"):  # its steps are no tokens of the ledger
        ledger.begin_attempt("sel", "r", "id")
    ledger.ensure_study(Study("s", PAID.mechanism, 1.0, 1e-6, 1))
    assert verify(tmp_path / "l").ok


def test_a_selection_that_its_epsilon_does_not_buy_is_found(tmp_path, monkeypatch):
    ledger = Ledger.open(str(tmp_path / "l"), "data", 4.0, 1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(Selection, "cost", lambda self: 0.0)
        ledger.ensure_selection(replace(PAID, epsilon=0.1))
    assert "does not buy selection 'sel'" in verify(tmp_path / "l").problems[0]


def test_a_holder_that_was_overtaken_writes_no_more(tmp_path):
    url = str(tmp_path / "l")
    first = Ledger.open(url, "data", 4.0, 1e-5)
    study = Study("s", Mechanism("poisson_gaussian", 1.0, 30.0), 3.0, 1e-6, 20)
    first.ensure_study(study)
    assert first.take_over("a/1") == 1
    attempt = first.begin_attempt("s", "r", "id")
    first.charge("s", "r", attempt, 0, 5)
    second = Ledger.open(url)
    assert second.take_over("b/1") == 2
    for call in (
        lambda: first.charge("s", "r", attempt, 1, 5),
        lambda: first.charge("s", "r", attempt, 0, 5),
        lambda: first.begin_attempt("s", "r", "id"),
        lambda: first.refund("s", "r", attempt, 0, 1),
        lambda: first.ensure_study(study),
    ):
        with pytest.raises(LedgerError, match="taken over"):
            call()
    assert second.charge("s", "r", attempt, 1, 5).first_step == 5
    assert first.state.study("s").used == 10
    assert verify(url).ok
