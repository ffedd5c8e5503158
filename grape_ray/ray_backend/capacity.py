"""A deadline for a cluster that is too small for the fewest workers of a run: Ray itself waits for
ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import ray

from grape_ray.ray_backend.background import Background

_POLL_S = 1.0


def workers_that_fit(use_gpu: bool) -> int:
    """How many workers the living nodes could hold, were they idle."""
    unit = "GPU" if use_gpu else "CPU"
    return sum(int(node["Resources"].get(unit, 0)) for node in ray.nodes() if node["Alive"])


def call_within_capacity(
    call: Callable[[], object], fewest: int, use_gpu: bool, timeout_s: float
) -> bool:
    """Runs `call` in another thread; gives up when the cluster was too small for `fewest` workers
    for `timeout_s` without a break.

    Returns:
        Whether it ended by itself.

    Raises:
        What `call` raises.
    """
    running, enough_s = Background(call), time.monotonic()
    while running.runs():
        running.wait(_POLL_S)
        if workers_that_fit(use_gpu) >= fewest:
            enough_s = time.monotonic()
        elif time.monotonic() - enough_s > timeout_s and running.runs():
            return False
    if running.error is not None:
        raise running.error
    return True
