"""Private selection: what releasing the best of a secret, random number of trials costs (Papernot
and Steinke 2022).
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import contextlib
import functools
import logging
import math
import secrets
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace

from grape_ray.accounting.mechanism import (
    GAUSSIAN,
    MAX_NOISE_MULTIPLIER,
    MIN_NOISE_MULTIPLIER,
    RECORD,
    Mechanism,
    check_count,
    check_delta,
    check_epsilon,
    check_name,
    finite,
)
from grape_ray.errors import BudgetExceeded, ConfigError
from grape_ray.storage import Json

NEGATIVE_BINOMIAL, POISSON = "truncated_negative_binomial", "poisson"
_PRECISION = 1e-4
# beyond, the first probabilities leave the range of floats
_MAX_MEAN = {NEGATIVE_BINOMIAL: 1e4, POISSON: 500.0}
# Each set of Renyi orders gives an upper bound; with all of dp_accounting's own it is 0.1 % lower,
# and takes twice as long.
_ORDERS = (
    1.25,
    1.5,
    1.75,
    *(n / 4 for n in range(8, 49)),
    *range(13, 64),
    72,
    80,
    96,
    128,
    192,
    256,
    512,
    1024,
)


@dataclass(frozen=True)
class Distribution:
    """The distribution of the number K of trials.

    Args:
        name: ``truncated_negative_binomial`` (K >= 1), or ``poisson`` (K may be 0, and then nothing
            is released).
        mean: the mean of K, above 1 and up to 10,000 (500 for ``poisson``).
        shape: of the negative binomial: 0 is the logarithmic distribution, the cheapest; 1 the
            geometric. Always 0 for ``poisson``.

    Raises:
        ConfigError: an unknown name, or a number out of range.
    """

    name: str
    mean: float
    shape: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in (NEGATIVE_BINOMIAL, POISSON):
            raise ConfigError(
                "unknown distribution of the number of trials",
                self.name,
                f"{NEGATIVE_BINOMIAL} or {POISSON}",
                "correct its name",
            )
        mean = finite("mean number of trials", self.mean)
        shape = finite("shape of the distribution", self.shape)
        most = _MAX_MEAN[self.name]
        if not 1 < mean <= most:
            raise ConfigError(
                "mean number of trials",
                mean,
                f"1 < mean <= {most:g}",
                "ask for another number of trials",
            )
        if not 0 <= shape <= (100 if self.name == NEGATIVE_BINOMIAL else 0):
            raise ConfigError(
                "shape of the distribution",
                shape,
                "0 to 100, and 0 for poisson",
                "0 is the logarithmic distribution",
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "shape", shape)

    def draw(self) -> int:
        """A number of trials, from the operating system's generator, by inversion. It must stay
        secret.
        """
        # no seed: who could draw it again would know how many trials lost
        uniform, k, mass = secrets.randbits(53) / 2**53, *self._first()
        total = mass
        # rounding may keep the total below the uniform for ever
        while total <= uniform and mass > 1e-300:
            mass *= self._ratio(k)
            k += 1
            total += mass
        return k

    def probabilities(self, most: int) -> list[float]:
        """P(K = 0), ..., P(K = most)."""
        k, mass = self._first()
        found = [0.0] * k
        while k <= most:
            found.append(mass)
            mass *= self._ratio(k)
            k += 1
        return found

    def _first(self) -> tuple[int, float]:
        """The smallest K and its probability (Papernot and Steinke, definition 1)."""
        if self.name == POISSON:
            return 0, math.exp(-self.mean)
        gamma, eta = _gamma(self.mean, self.shape), self.shape
        return 1, (
            (1 - gamma) / math.log(1 / gamma)
            if eta == 0
            else (1 - gamma) * eta / math.expm1(-eta * math.log(gamma))
        )

    def _ratio(self, k: int) -> float:
        """P(K = k + 1) / P(K = k)."""
        return (
            self.mean / (k + 1)
            if self.name == POISSON
            else (1 - _gamma(self.mean, self.shape)) * (k + self.shape) / (k + 1)
        )


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without dp_accounting's warnings of Renyi orders that it leaves out: with fewer orders the
    bound is larger, never wrong.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.lru_cache(maxsize=8)
def _gamma(mean: float, shape: float) -> float:
    """The parameter of the truncated negative binomial that has this mean, by halving; the mean
    falls in gamma.
    """
    low, high = -60.0, -1e-12  # of log gamma
    while high - low > 1e-14 * abs(low):
        middle = (low + high) / 2
        found = (
            math.expm1(-middle) / -middle
            if shape == 0
            else shape * math.expm1(-middle) / -math.expm1(shape * middle)
        )
        low, high = (middle, high) if found > mean else (low, middle)
    return math.exp(low)


@dataclass(frozen=True)
class Selection:
    """A share of the dataset's budget that pays for the release of the best of K trials, whatever K
    turns out to be.

    Guarantees: (epsilon, delta) for the winner alone, where every trial is drawn from one fixed
    distribution, takes at most ``trial_tokens`` steps of the mechanism, and nothing but the winner
    is released. The whole is charged when the ledger takes it in.

    Args:
        name: unique in its ledger, also among studies.
        mechanism: what each step of a trial is; exact norms only. epsilon, delta: the share.
        trial_tokens: the most steps of one trial, repeats included. distribution: of the number of
            trials.
        unit: the privacy unit, by the name of its column; ``record`` where there is none.

    Raises:
        ConfigError: a number is out of range, or the mechanism has no Renyi bound.
    """

    name: str
    mechanism: Mechanism
    epsilon: float
    delta: float
    trial_tokens: int
    distribution: Distribution
    unit: str = RECORD

    def __post_init__(self) -> None:
        check_name("selection", self.name)
        check_name("unit", self.unit)
        if self.mechanism.name != GAUSSIAN:
            expected = "a method with exact norms"
            raise ConfigError(
                "private selection needs Renyi bounds",
                self.mechanism.name,
                expected,
                "use another method, or mode compose",
            )
        object.__setattr__(self, "epsilon", check_epsilon(self.epsilon))
        object.__setattr__(self, "delta", check_delta(self.delta))
        object.__setattr__(self, "trial_tokens", check_count("trial_tokens", self.trial_tokens))

    def payload(self) -> Json:
        """The selection as an entry's payload."""
        fields = asdict(self)
        number = fields.pop("distribution")  # `law` is its name in files
        if self.unit == RECORD:  # as files say it by saying nothing
            del fields["unit"]
        return {**fields, "law": number["name"], "mean": number["mean"], "shape": number["shape"]}

    def cost(self) -> float:
        """The epsilon, at its delta, that the selection really costs."""
        return epsilon(self.mechanism, self.trial_tokens, self.distribution, self.delta)


def epsilon(
    mechanism: Mechanism, trial_steps: int, distribution: Distribution, delta: float
) -> float:
    """An upper bound on the epsilon of releasing the best of K trials of ``trial_steps`` steps
    each; infinity where none holds.

    Renyi bounds, with the theorems 2 (truncated negative binomial) and 6 (Poisson) of Papernot and
    Steinke (2022). It does not depend on how many trials really run.

    Raises:
        ConfigError: a number is out of range, or the mechanism has no Renyi bound.
    """
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    if mechanism.name != GAUSSIAN:
        raise ConfigError(
            "private selection needs Renyi bounds",
            mechanism.name,
            "a method with exact norms",
            "use mode compose",
        )
    step = dp_event.PoissonSampledDpEvent(
        mechanism.sampling_prob, dp_event.GaussianDpEvent(mechanism.noise_multiplier)
    )
    trial = dp_event.SelfComposedDpEvent(step, check_count("trial_steps", trial_steps))
    accountant = RdpAccountant(_ORDERS)
    with _quiet():
        # dp_accounting's word for Poisson is an infinite shape
        shape = math.inf if distribution.name == POISSON else distribution.shape
        accountant.compose(dp_event.RepeatAndSelectDpEvent(trial, distribution.mean, shape))
    found = float(accountant.get_epsilon(check_delta(delta)))
    return found if found >= 0 else math.inf  # also where it is NaN


def noise_multiplier(
    wanted: float, delta: float, sampling_prob: float, trial_steps: int, distribution: Distribution
) -> float:
    """The least noise multiplier, to 0.01 % and never below it, with which the selection costs at
    most (wanted, delta).

    Raises:
        ConfigError: a number is out of range. BudgetExceeded: not even the largest noise multiplier
            suffices.
    """
    wanted, most = check_epsilon(wanted), Mechanism(GAUSSIAN, sampling_prob, MAX_NOISE_MULTIPLIER)

    def fits(log_sigma: float) -> bool:
        mechanism = replace(most, noise_multiplier=math.exp(log_sigma))
        return epsilon(mechanism, trial_steps, distribution, delta) <= wanted

    # the exponential of the largest logarithm must not round above the largest noise
    least, largest = math.log(MIN_NOISE_MULTIPLIER), math.log(MAX_NOISE_MULTIPLIER) - 1e-12
    high = 0.0
    while not fits(high):
        if high == largest:
            what = "no noise multiplier is large enough for the selection"
            raise BudgetExceeded(
                what,
                None,
                "a budget that pays for one",
                "raise epsilon or delta, or ask for fewer trials",
            )
        high = min(largest, high + 1)
    low = high - 1
    while low > least and fits(low):
        low, high = low - 1, low
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return math.exp(high)
