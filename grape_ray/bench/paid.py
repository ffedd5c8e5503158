"""A grant for steps that protect nobody: benchmarks pay, too, from a ledger in memory."""

from __future__ import annotations

import secrets

from grape_ray.accounting.mechanism import GAUSSIAN, RANDOMIZED, Mechanism
from grape_ray.ledger.entries import Study
from grape_ray.ledger.grant import Grant
from grape_ray.ledger.ledger import Ledger

NOISE_MULTIPLIER = 1.0  # as Opacus is given it, too
_STEPS = 100_000
_EPSILON, _DELTA = 100.0, 1e-5  # buys them at this rate of sampling
_SAMPLING_PROB = 1e-3


def paid_steps(estimated: tuple[int, bool] | None = None) -> Grant:
    """A grant for the steps from 0 on, as many as any benchmark takes, at noise multiplier 1.

    Args:
        estimated: as in `ClippedSum`.
    """
    url = f"memory://bench/{secrets.token_hex(8)}"
    ledger = Ledger.open(url, "benchmark", _EPSILON, _DELTA)
    kind = (RANDOMIZED, *estimated) if estimated else (GAUSSIAN, 0, False)
    mechanism = Mechanism(kind[0], _SAMPLING_PROB, NOISE_MULTIPLIER, *kind[1:])
    ledger.ensure_study(Study("benchmark", mechanism, _EPSILON, _DELTA, _STEPS))
    attempt = ledger.begin_attempt("benchmark", "run", "key")
    return ledger.charge("benchmark", "run", attempt, 0, _STEPS)
