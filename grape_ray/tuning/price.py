"""What a sweep costs: its step tokens and noise in mode compose, the whole selection in mode
select, and its private scores.
"""

from __future__ import annotations

from grape_ray.accounting import calibration
from grape_ray.accounting import selection as selections
from grape_ray.accounting.mechanism import GAUSSIAN, MAX_EPSILON, Mechanism
from grape_ray.accounting.selection import Distribution, Selection
from grape_ray.errors import BudgetExceeded, ConfigError
from grape_ray.ledger.entries import Study
from grape_ray.training.pricing import mechanism_kind
from grape_ray.tuning.spaces import SweepStudy

# trials that arrive early are promoted against few rivals, so more go on than one in
# `reduction_factor`
_ASYNCHRONOUS = 1.5


def planned_tokens(study: SweepStudy, trials: int, scheduler: str) -> int:
    """Steps that a sweep is expected to take at most, spare steps included; trials that find no
    token left end gracefully.

    With `asha` that is successive halving's number, half as many again for its asynchrony;
    otherwise every trial in full.
    """
    steps, rung, factor = (
        study.config.privacy.steps,
        study.config.performance.eval_every,
        study.reduction_factor,
    )
    full = trials * steps
    if scheduler == "asha":
        expected, left, done = 0.0, float(trials), 0
        while done < steps:
            until = min(steps, rung if done == 0 else done * factor)
            expected += max(left, 1.0) * (until - done)
            left, done = left / factor, until
        full = min(full, max(steps, int(_ASYNCHRONOUS * expected)))
    return full + study.config.privacy.spare_steps


def compose(
    study: SweepStudy, name: str, sampling_prob: float, epsilon: float, delta: float, tokens: int
) -> Study:
    """The study of a sweep: the least noise with which so many steps cost (epsilon, delta), or,
    where the default run names its noise, the steps that it buys, `tokens` at most.

    Raises:
        BudgetExceeded: the budget does not buy a step.
    """
    kind, sigma = mechanism_kind(study.config), study.config.privacy.noise_multiplier
    if sigma is None:
        method = {"method": kind["name"], **{k: v for k, v in kind.items() if k != "name"}}
        sigma = calibration.noise_multiplier(epsilon, delta, sampling_prob, tokens, **method)
        return Study(
            name,
            Mechanism(**kind, sampling_prob=sampling_prob, noise_multiplier=sigma),
            epsilon,
            delta,
            tokens,
            study.config.privacy.unit_name,
        )
    mechanism = Mechanism(**kind, sampling_prob=sampling_prob, noise_multiplier=sigma)
    bought = min(tokens, calibration.steps_within(mechanism, epsilon, delta))
    if bought == 0:
        raise BudgetExceeded(
            "privacy.noise_multiplier is too small",
            sigma,
            "enough for one step",
            "raise it, or the budget",
        )
    return Study(name, mechanism, epsilon, delta, bought, study.config.privacy.unit_name)


def select(
    study: SweepStudy,
    name: str,
    sampling_prob: float,
    epsilon: float,
    delta: float,
    distribution: Distribution,
) -> Selection:
    """The selection of a sweep: each trial may take privacy.steps + spare_steps, with the least
    noise that fits the budget.

    Raises:
        BudgetExceeded: no noise is large enough, or the default run's own is not. ConfigError: a
            method without Renyi bounds.
    """
    trial = study.config.privacy.steps + study.config.privacy.spare_steps
    sigma = study.config.privacy.noise_multiplier
    if sigma is None:
        sigma = selections.noise_multiplier(epsilon, delta, sampling_prob, trial, distribution)
    mechanism = Mechanism(
        **mechanism_kind(study.config), sampling_prob=sampling_prob, noise_multiplier=sigma
    )
    unit = study.config.privacy.unit_name
    return Selection(name, mechanism, epsilon, delta, trial, distribution, unit)


def trial_epsilon(paid: Selection) -> float:
    """A bound on what one trial of a selection costs by itself: the budget of its sealed ledger. It
    knows nothing of the other trials.

    Raises:
        ConfigError: no ledger can hold so much.
    """
    cost = calibration.epsilon(paid.mechanism, paid.trial_tokens, paid.delta) * 1.001 + 1e-6
    if cost > MAX_EPSILON:
        raise ConfigError(
            "a trial of the selection has no useful epsilon",
            None,
            "more noise",
            "lower --budget-epsilon",
        )
    return cost


def scores(study: SweepStudy, name: str, count: int) -> Study:
    """The study, on the validation records' own ledger, that pays for `count` private scores: a
    count with Gaussian noise each.
    """
    sigma = calibration.noise_multiplier(study.score_epsilon, study.score_delta, 1.0, count)
    return Study(
        name, Mechanism(GAUSSIAN, 1.0, sigma), study.score_epsilon, study.score_delta, count
    )


def select_scores(study: SweepStudy, name: str, distribution: Distribution) -> Selection:
    """As `scores` in mode select, where a trial has one score."""
    sigma = selections.noise_multiplier(
        study.score_epsilon, study.score_delta, 1.0, 1, distribution
    )
    return Selection(
        name,
        Mechanism(GAUSSIAN, 1.0, sigma),
        study.score_epsilon,
        study.score_delta,
        1,
        distribution,
    )


def planned_scores(study: SweepStudy, tokens: int, trials: int) -> int:
    """Scores that a sweep of so many steps and trials may ask for."""
    return tokens // study.config.performance.eval_every + 2 * trials
