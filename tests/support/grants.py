"""Grants for tests of what comes after them: any noise multiplier, no ledger, no price."""

from grape_ray.accounting.mechanism import GAUSSIAN, RANDOMIZED, Mechanism
from grape_ray.ledger import grant


def granted(
    noise_multiplier: float = 1.0, first_step: int = 0, steps: int = 10**6, probes: int = 0
) -> grant.Grant:
    """A grant that no ledger has made, which only a test may have."""
    mechanism = Mechanism(RANDOMIZED if probes else GAUSSIAN, 0.5, 1.0, probes)
    object.__setattr__(mechanism, "noise_multiplier", noise_multiplier)  # also one out of range
    return grant.Grant("s", "r", 1, 0, first_step, steps, mechanism, grant._LEDGER)
