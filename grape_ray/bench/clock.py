"""The clock of the benchmarks: CPU-seconds of this process (user and system, all threads), or
seconds of a synchronised GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def clock(device: str) -> Callable[[], float]:
    """A function that tells the time in seconds, from an arbitrary origin.

    CPU-seconds leave out what other processes do on the machine, and count every thread; idle
    threads must sleep rather than spin (OMP_WAIT_POLICY=passive, which `processes` sets).
    """
    if device == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now
