"""What one training step costs: the mechanism, and the checks that every number passes before an
accountant sees it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import cast

from grape_ray.errors import ConfigError

GAUSSIAN = "poisson_gaussian"
RANDOMIZED = "poisson_randomized"
MECHANISMS = (GAUSSIAN, RANDOMIZED)
RECORD = "record"  # the privacy unit, where no column names another

MIN_DELTA = 1e-11  # the numerics of privacy loss distributions break below it
MAX_STEPS = 10**6  # the longest composition whose numerics were checked
MAX_NOISE_MULTIPLIER = 1e6
MIN_NOISE_MULTIPLIER = 1e-2
MAX_EPSILON = 1e4
MAX_PROBES = 10**6
MAX_NAME = 200


def finite(name: str, value: object) -> float:
    """The value as a float.

    An accountant that meets NaN may report epsilon 0 in silence, so nothing unchecked is let
    through.

    Raises:
        ConfigError: it is not a real number, or is NaN or infinite.
    """
    try:
        real = isinstance(value, Real) and not isinstance(value, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
        number = float(cast(float, value)) if real else math.nan
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(
            f"{name} is not a finite number", value, "a finite number", f"correct {name}"
        )
    return number


def check_epsilon(value: object, name: str = "epsilon") -> float:
    """A finite epsilon in (0, 1e4], or ConfigError."""
    number = finite(name, value)
    if not 0 < number <= MAX_EPSILON:
        raise ConfigError(
            f"{name} is out of range",
            number,
            f"0 < {name} <= {MAX_EPSILON:g}",
            "typical values lie between 0.5 and 10",
        )
    return number


def check_delta(value: object, name: str = "delta") -> float:
    """A finite delta in [1e-11, 1), or ConfigError."""
    number = finite(name, value)
    if not MIN_DELTA <= number < 1:
        fix = "choose it well below one over the number of records, or of privacy units"
        raise ConfigError(f"{name} is out of range", number, f"{MIN_DELTA:g} <= {name} < 1", fix)
    return number


def check_sampling_prob(value: object) -> float:
    """A sampling probability in (0, 1], or ConfigError."""
    number = finite("sampling_prob", value)
    if not 0 < number <= 1:
        fix = "it is the expected batch size over the number of records, or of privacy units"
        raise ConfigError("sampling_prob is out of range", number, "0 < sampling_prob <= 1", fix)
    return number


def check_noise_multiplier(value: object) -> float:
    """A noise multiplier (noise standard deviation over clip_norm) in [0.01, 1e6], or
    ConfigError.
    """
    number = finite("noise_multiplier", value)
    if not MIN_NOISE_MULTIPLIER <= number <= MAX_NOISE_MULTIPLIER:
        expected = f"{MIN_NOISE_MULTIPLIER:g} <= noise_multiplier <= {MAX_NOISE_MULTIPLIER:g}"
        raise ConfigError(
            "noise_multiplier is out of range",
            number,
            expected,
            "typical values lie between 0.5 and 20",
        )
    return number


def check_count(name: str, value: object, minimum: int = 1, maximum: int = MAX_STEPS) -> int:
    """An integer (no bool, no float) within [minimum, maximum], or ConfigError."""
    if (
        isinstance(value, bool)
        or not isinstance(value, Integral)
        or not minimum <= int(value) <= maximum
    ):
        raise ConfigError(
            f"{name} is not a usable count",
            value,
            f"an integer from {minimum} to {maximum}",
            f"correct {name}",
        )
    return int(value)


def check_name(field: str, value: object) -> str:
    """A printable name of 1 to 200 characters, or ConfigError."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or not value.isprintable():
        raise ConfigError(
            f"{field} is not a usable name",
            value,
            f"1 to {MAX_NAME} printable characters",
            f"rename the {field}",
        )
    return value


@dataclass(frozen=True)
class Mechanism:
    """One step of training as the accountant sees it; adjacency is adding or removing one example
    (one privacy unit), and nothing else.

    The noise has standard deviation ``noise_multiplier * clip_norm`` in every coordinate, where
    ``clip_norm`` bounds what one example adds to the sum, so neither the clip norm, nor the rank of
    a projection, nor the model's size appears here.

    Args:
        name: ``poisson_gaussian`` (exact norms) or ``poisson_randomized`` (norms estimated with
            Gaussian probes).
        sampling_prob: chance of each example to be in a batch, independently (Poisson sampling).
        noise_multiplier: noise standard deviation over clip_norm.
        probes: for ``poisson_randomized``, the fewest probes of any layer whose norm is estimated;
            otherwise 0.
        probes_shared: for ``poisson_randomized``, True where one draw of probes serves a whole
            batch, False where each example has probes of its own that are kept secret.

    Raises:
        ConfigError: a number is out of range, or the probes do not go with the name.
    """

    name: str
    sampling_prob: float
    noise_multiplier: float
    probes: int = 0
    probes_shared: bool = False

    def __post_init__(self):
        if self.name not in MECHANISMS:
            raise ConfigError(
                "unknown mechanism", self.name, " or ".join(MECHANISMS), "correct its name"
            )
        object.__setattr__(self, "sampling_prob", check_sampling_prob(self.sampling_prob))
        object.__setattr__(self, "noise_multiplier", check_noise_multiplier(self.noise_multiplier))
        # a 1 would compare equal to True, and be another entry in a ledger
        if type(self.probes_shared) is not bool:
            raise ConfigError(
                "probes_shared is not a truth value",
                self.probes_shared,
                "True or False",
                "correct probes_shared",
            )
        lowest, highest = (1, MAX_PROBES) if self.name == RANDOMIZED else (0, 0)
        check_count(f"probes of {self.name}", self.probes, lowest, highest)
        if self.name == GAUSSIAN and self.probes_shared:
            raise ConfigError(
                "probes_shared without probes", True, "False", f"name the mechanism {RANDOMIZED}"
            )
