"""Which batch makes most of a number of passes over the data: batch size against steps, at one
price.

A step's noise is the same for any batch, so the mean of a larger one is less noisy; but with as
many passes there are fewer steps, each of which costs more. What a whole run sees of a constant
signal through its noise, `batch * sqrt(steps) / noise_multiplier`, grows with the batch for as
long as steps are left: a model does not learn in a handful of them (the "total noise" of Sander,
Stock and Sablayrolles 2023, "TAN without a burn").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grape_ray.accounting.calibration import noise_multiplier
from grape_ray.errors import ConfigError

# With much fewer Adam has not gone anywhere, whatever the noise.
FEWEST_STEPS = 100


@dataclass(frozen=True)
class Schedule:
    """One way to spend a budget and a number of passes over the data.

    Attributes:
        batch: expected batch size, in privacy units. steps: optimizer steps. noise_multiplier: that
            epsilon and delta ask for. signal: `batch * sqrt(steps) / noise_multiplier`, to be
            compared between schedules.
    """

    batch: int
    steps: int
    noise_multiplier: float

    @property
    def signal(self) -> float:
        return self.batch * math.sqrt(self.steps) / self.noise_multiplier


def schedules(units: int, epochs: float, epsilon: float, delta: float) -> list[Schedule]:
    """Schedules of the same compute and the same guarantee, for each power of two of the batch with
    at least 10 steps.

    Args:
        units: number of privacy units, N. epochs: passes over them, on average.

    >>> found = schedules(50_000, epochs=4, epsilon=3.0, delta=1e-5)
    >>> [(s.batch, s.steps) for s in found][-3:]
    [(4096, 49), (8192, 24), (16384, 12)]
    >>> found[-1].signal > found[0].signal
    True

    Raises:
        ConfigError: not a number of units or of passes.
    """
    for name, value in (("units", units), ("epochs", epochs)):
        if not 0 < value < math.inf:
            raise ConfigError(name, value, "a number > 0", "count the records, or their units")
    made: list[Schedule] = []
    batch = 16
    while batch <= units // 2 and epochs * units / batch >= 10:
        steps = round(epochs * units / batch)
        made.append(Schedule(batch, steps, noise_multiplier(epsilon, delta, batch / units, steps)))
        batch *= 2
    return made


def largest_batch(units: int, epochs: float) -> int:
    """The largest power of two, of at most half of the units and at least 1, with which so many
    passes are about `FEWEST_STEPS` steps or more.

    >>> largest_batch(67_349, epochs=6), largest_batch(100, epochs=6)
    (4096, 4)
    """
    most = min(epochs * units / FEWEST_STEPS, units / 2)
    return 2 ** max(0, math.floor(math.log2(max(most, 1)) + 0.05))
