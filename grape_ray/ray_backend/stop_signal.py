"""How whoever launched a run on workers asks it to end: the launcher sets a stop signal, and rank 0
asks whether it is set.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from grape_ray.ray_backend.background import Background
from grape_ray.training import signals
from grape_ray.training.progress import Signal

_POLL_S = 0.2
_ANSWER_S = 5.0
# A stop signal that no worker has read for so long ends the launch: no worker has begun.
_UNREAD_S = 10.0


class StopSignal:
    """Set once, by the launcher; runs as an actor."""

    def __init__(self) -> None:
        self._set = self._read = False

    def set(self) -> None:
        """The run is to end."""
        self._set = True

    def is_set(self) -> bool:
        """Whether the run is to end; asked by a worker that trains."""
        self._read = self._read or self._set
        return self._set

    def was_read(self) -> bool:
        """Whether a worker knows that the run is to end."""
        return self._read


def make_stop_signal() -> Any:
    """A StopSignal as an actor that takes no CPU; it lives as long as this process or whoever holds
    it.
    """
    return ray.remote(StopSignal).options(num_cpus=0).remote()


def is_set(stop: Any) -> bool:
    """Whether the launcher has set the signal; no, where it cannot be asked."""
    with contextlib.suppress(RayError):
        return bool(ray.get(stop.is_set.remote(), timeout=_ANSWER_S))
    return False


def call_until_stopped(launch: Callable[[], object], stop: Any) -> bool:
    """Calls `launch` in another thread, and sets the stop signal when this process receives SIGTERM
    or SIGINT.

    Returns:
        Whether it was set.

    Raises:
        What `launch` raises. KeyboardInterrupt: a second signal.
    """
    running, set_at_s = Background(launch), 0.0
    with signals.installed():
        while running.runs():
            running.wait(_POLL_S)
            if not set_at_s and signals.received() is Signal.STOP:
                set_at_s = time.monotonic()
                ray.get(stop.set.remote(), timeout=_ANSWER_S)
            if (
                set_at_s
                and time.monotonic() - set_at_s > _UNREAD_S
                and not ray.get(stop.was_read.remote(), timeout=_ANSWER_S)
            ):
                return True
    # Once stopped, how the workers ended is no news: the caller says that the run was interrupted.
    if running.error is not None and not set_at_s:
        raise running.error
    return bool(set_at_s)
