"""Epsilon, noise and number of steps, each from the other two and always an upper bound, with
privacy loss distributions.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import functools
import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from grape_ray.accounting import cache
from grape_ray.accounting.mechanism import (
    GAUSSIAN,
    MAX_NOISE_MULTIPLIER,
    MAX_STEPS,
    MIN_NOISE_MULTIPLIER,
    RANDOMIZED,
    Mechanism,
    check_count,
    check_delta,
    check_epsilon,
)
from grape_ray.accounting.roots import boundary
from grape_ray.errors import BudgetExceeded

if TYPE_CHECKING:
    from grape_ray.accounting.composition import Composition
    from grape_ray.accounting.losses import Losses

# spacing of privacy losses: needless work below, needless error above
_FINEST, _COARSEST = 1e-5, 1e-2
_MAX_CELLS = 1_000_000
_ENOUGH = 5e-4  # relative change of epsilon under a halved spacing that ends the refinement
_PRECISION = 1e-4  # relative width of the bracket that ends the search for a noise multiplier
_LOOSE = 1e-3  # a remembered noise multiplier that is so much above what would do is not used


def epsilon(mechanism: Mechanism, steps: int, delta: float) -> float:
    """An upper bound, tight to about 0.1 %, on the epsilon of ``steps`` adaptively composed steps
    at this delta.

    Add/remove adjacency only. Pessimistic connect-the-dots discretisation (Doroshenko et al. 2022),
    composed by FFT with every rounding error added (`accounting.composition`); each spacing gives
    an upper bound, so refining stops when it no longer pays. Without subsampling the closed form is
    used.

    Returns:
        epsilon >= 0; infinity where no finite one holds.

    Raises:
        ConfigError: a number is out of range.

    >>> from grape_ray import Mechanism
    >>> step = Mechanism("poisson_gaussian", sampling_prob=0.01, noise_multiplier=1.1)
    >>> round(epsilon(step, steps=1000, delta=1e-5), 2)
    1.52
    """
    steps, delta = check_count("steps", steps), check_delta(delta)
    if _plain(mechanism):
        return _gaussian_epsilon(math.sqrt(steps) / mechanism.noise_multiplier, delta)
    return float(_refined(mechanism, steps, delta)[0])


def affords(mechanism: Mechanism, steps: int, epsilon: float, delta: float) -> bool:
    """Whether ``steps`` steps are (epsilon, delta)-differentially private; True is proved, False
    may be off by 0.05 % of epsilon.

    Raises:
        ConfigError: a number is out of range.
    """
    steps, epsilon, delta = check_count("steps", steps), check_epsilon(epsilon), check_delta(delta)
    if _plain(mechanism):
        return _gaussian_delta(math.sqrt(steps) / mechanism.noise_multiplier, epsilon) <= delta
    spacing = _first_spacing(mechanism)
    # any spacing proves it, so a failure only means to look closer
    while _excess(mechanism, steps, epsilon, delta, spacing) > 0:
        spacing /= 2
        if spacing < _FINEST or _cells(mechanism, steps, spacing) > _MAX_CELLS:
            return False
    return True


def noise_multiplier(
    epsilon: float,
    delta: float,
    sampling_prob: float,
    steps: int,
    *,
    method: str = GAUSSIAN,
    probes: int = 0,
    probes_shared: bool = False,
) -> float:
    """The least noise multiplier, to 0.01 % and never below it, with which ``steps`` steps cost at
    most (epsilon, delta).

    Answers are remembered on disk (``accounting.cache``). One that is recalled is proved again by
    ``affords``, and searched anew where 0.1 % less would do, as where an older version found it.

    Raises:
        ConfigError: a number is out of range.
        BudgetExceeded: not even the largest noise multiplier suffices.

    >>> round(noise_multiplier(3.0, delta=1e-5, sampling_prob=0.01, steps=1000), 2)
    0.81
    """
    epsilon, delta, steps = check_epsilon(epsilon), check_delta(delta), check_count("steps", steps)
    most = Mechanism(method, sampling_prob, MAX_NOISE_MULTIPLIER, probes, probes_shared)
    question = {**asdict(most), "epsilon": epsilon, "delta": delta, "steps": steps}
    # a hint alone, which an edited file could hold: proved below
    known = cache.recall(question)
    if known is not None and MIN_NOISE_MULTIPLIER <= known <= MAX_NOISE_MULTIPLIER:
        at = replace(most, noise_multiplier=known)
        if affords(at, steps, epsilon, delta) and not _loose(at, steps, epsilon, delta):
            return known
    found = _least_noise(most, epsilon, delta, steps)
    cache.remember(question, found)
    return found


def _loose(mechanism: Mechanism, steps: int, epsilon: float, delta: float) -> bool:
    """Whether clearly less noise than the mechanism's is enough, as far as one look at a fine
    spacing tells.
    """
    less = mechanism.noise_multiplier * (1 - _LOOSE)
    if less < MIN_NOISE_MULTIPLIER:
        return False
    quieter, spacing = replace(mechanism, noise_multiplier=less), _first_spacing(mechanism)
    for _ in range(3):  # an eighth of the first spacing costs 0.02 % of epsilon
        if spacing / 2 >= _FINEST and _cells(quieter, steps, spacing / 2) <= _MAX_CELLS:
            spacing /= 2
    return _excess(quieter, steps, epsilon, delta, spacing) <= 0


def _least_noise(most: Mechanism, epsilon: float, delta: float, steps: int) -> float:
    """The search behind ``noise_multiplier``; `most` is the mechanism at the largest noise."""

    def search(start: float, width: float, reach: float, spacing: float | None = None) -> float:
        # by minus the logarithm of the noise: `boundary` wants a function that increases
        def excess(log_quiet: float) -> float:
            at = replace(
                most,
                noise_multiplier=min(
                    MAX_NOISE_MULTIPLIER, max(MIN_NOISE_MULTIPLIER, math.exp(-log_quiet))
                ),
            )
            return _excess(at, steps, epsilon, delta, spacing or _first_spacing(at))

        bounds = -math.log(MAX_NOISE_MULTIPLIER), -math.log(MIN_NOISE_MULTIPLIER)
        found = boundary(excess, -math.log(start), bounds, width, reach)
        if found is None:
            fix = "raise epsilon or delta, or lower sampling_prob or steps"
            raise BudgetExceeded(
                "no noise multiplier is large enough",
                None,
                f"one up to {MAX_NOISE_MULTIPLIER:g}",
                fix,
            )
        return min(MAX_NOISE_MULTIPLIER, max(MIN_NOISE_MULTIPLIER, math.exp(-found)))

    if _plain(most):
        return search(math.sqrt(steps), 1e-7, 1.0)
    # A coarse search finds the neighbourhood, where the spacing that is needed is known; the
    # fine search starts from there.
    rough = search(1.0, 0.02, 0.5)
    spacing = _refined(replace(most, noise_multiplier=rough), steps, delta)[1]
    return search(rough, _PRECISION, 0.02, spacing)


def steps_within(mechanism: Mechanism, epsilon: float, delta: float) -> int:
    """The largest number of steps, up to 10^6 and to 0.01 % from below, that is (epsilon,
    delta)-private; 0 where not one step is.

    Raises:
        ConfigError: a number is out of range.

    >>> from grape_ray import Mechanism
    >>> step = Mechanism("poisson_gaussian", sampling_prob=0.01, noise_multiplier=1.1)
    >>> steps_within(step, epsilon=3.0, delta=1e-5) > 3700
    True
    """
    epsilon, delta = check_epsilon(epsilon), check_delta(delta)

    def search(start: int, width: float, reach: float, spacing: float) -> int:
        def excess(log_steps: float) -> float:
            # the exponential of a logarithm of n may fall short of n by a rounding
            return _excess(mechanism, int(math.exp(log_steps) + 1e-6), epsilon, delta, spacing)

        found = boundary(excess, math.log(start), (0.0, math.log(MAX_STEPS)), width, reach)
        return 0 if found is None else int(math.exp(found) + 1e-6)

    spacing = _first_spacing(mechanism)
    guess = max(1, search(100, 0.02, 2.0, spacing))
    if not _plain(mechanism):
        spacing = _refined(mechanism, guess, delta)[1]
    count = search(guess, _PRECISION, 0.02, spacing)
    return (
        count + 1
        if count < MAX_STEPS and _excess(mechanism, count + 1, epsilon, delta, spacing) <= 0
        else count
    )


def _refined(mechanism: Mechanism, steps: int, delta: float) -> tuple[float, float]:
    """(epsilon, spacing), halving the spacing until it matters no more."""
    spacing = _first_spacing(mechanism)
    best = _composed_epsilon(mechanism, steps, spacing, delta)
    while spacing / 2 >= _FINEST and _cells(mechanism, steps, spacing / 2) <= _MAX_CELLS:
        spacing /= 2
        finer = _composed_epsilon(mechanism, steps, spacing, delta)
        if finer >= best * (1 - _ENOUGH):
            return min(best, finer), spacing
        best = finer
    return best, spacing


def _excess(
    mechanism: Mechanism, steps: int, epsilon: float, delta: float, spacing: float
) -> float:
    """Logarithm of (an upper bound on the composition's delta at epsilon, over delta): not above 0
    where the steps fit.
    """
    if _plain(mechanism):
        reached = _gaussian_delta(math.sqrt(steps) / mechanism.noise_multiplier, epsilon)
    else:
        reached = max(composed.delta(epsilon) for composed in _composed(mechanism, steps, spacing))
    return math.log(max(reached, 1e-300) / delta)


def _composed(mechanism: Mechanism, steps: int, spacing: float) -> list[Composition]:
    """The compositions for removing and for adding an example."""
    from grape_ray.accounting.composition import Composition

    return [Composition(losses, steps) for losses in _one_step(mechanism, spacing)]


def _composed_epsilon(mechanism: Mechanism, steps: int, spacing: float, delta: float) -> float:
    return max(composed.epsilon(delta) for composed in _composed(mechanism, steps, spacing))


# one search asks for many numbers of steps of one mechanism
@functools.lru_cache(maxsize=4)
def _one_step(mechanism: Mechanism, spacing: float) -> tuple[Losses, Losses]:
    """The losses of one step, on multiples of the spacing, for removing and for adding an
    example.
    """
    # Imported here: scipy, which a ledger's reader need not wait for.
    if mechanism.name == RANDOMIZED:
        from grape_ray.accounting.randomized import one_step

        return one_step(mechanism, spacing)
    from grape_ray.accounting.losses import gaussian

    return gaussian(mechanism.noise_multiplier, mechanism.sampling_prob, spacing)


def _first_spacing(mechanism: Mechanism) -> float:
    """A quarter of the standard deviation of one step's privacy loss, roughly: coarser spacings
    lose more than they save.
    """
    inverse = 1 / mechanism.noise_multiplier
    # capped, so that the exponential stays a double; there the other bound is the smaller
    loss = min(mechanism.sampling_prob * math.sqrt(math.expm1(min(inverse**2, 100.0))), inverse)
    return min(_COARSEST, max(_FINEST, loss / 4))


def _cells(mechanism: Mechanism, steps: int, spacing: float) -> float:
    """About how many cells the composition has at this spacing."""
    inverse = 1 / mechanism.noise_multiplier
    one = inverse**2 / 2 + 10 * inverse
    loss = min(mechanism.sampling_prob * math.sqrt(math.expm1(min(inverse**2, 100.0))), inverse)
    return (one + steps * loss**2 / 2 + 16 * math.sqrt(steps) * loss) / spacing


def _plain(mechanism: Mechanism) -> bool:
    """Whether each step is a Gaussian mechanism on the whole dataset, whose composition is one
    Gaussian mechanism.
    """
    return mechanism.name == GAUSSIAN and mechanism.sampling_prob == 1.0


def _gaussian_delta(mu: float, epsilon: float) -> float:
    """The delta of a Gaussian mechanism of sensitivity over noise mu (Balle and Wang 2018, theorem
    8).
    """
    from scipy.special import log_ndtr

    # in logarithms: e^epsilon overflows, and the tails underflow, long before their product does
    upper = float(log_ndtr(mu / 2 - epsilon / mu))
    lower = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return math.exp(upper) * -math.expm1(min(0.0, lower - upper))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """An upper bound on the epsilon of a Gaussian mechanism of sensitivity over noise mu."""
    if _gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    # `high` is what is returned: the end at which delta holds
    while _gaussian_delta(mu, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _gaussian_delta(mu, middle) <= delta else (middle, high)
    return high
