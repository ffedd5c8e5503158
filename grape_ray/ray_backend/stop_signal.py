"""How a run on workers is told to end by whoever launched it: a bell that rank 0 listens to, and a
launcher that rings it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, cast

import ray
from ray.exceptions import RayError

from grape_ray.ray_backend.background import Background
from grape_ray.training import signals
from grape_ray.training.progress import Signal

_LOOK_EVERY_S = 0.2
_ANSWER_S = 5.0
_DEAF_S = 10.0  # after which a bell that nobody listens to ends the launch: no worker has begun


class Bell:
    """Rung at most once."""

    def __init__(self) -> None:
        self._rung = self._heard = False

    def ring(self) -> None:
        """The run is to end."""
        self._rung = True

    def rung(self) -> bool:
        """Whether it is to end; asked by a worker that trains."""
        self._heard = self._heard or self._rung
        return self._rung

    def heard(self) -> bool:
        """Whether a worker knows it."""
        return self._heard


def hang() -> Any:
    """A bell, as an actor that takes no CPU; it lives as long as this process or whoever holds
    it.
    """
    return cast(Any, ray.remote(Bell)).options(num_cpus=0).remote()


def is_rung(bell: Any) -> bool:
    """Whether the launcher has rung; no, where it cannot be asked."""
    with contextlib.suppress(RayError):
        return bool(ray.get(bell.rung.remote(), timeout=_ANSWER_S))
    return False


def until_told(launch: Callable[[], Any], bell: Any) -> bool:
    """Calls `launch` in another thread and rings the bell when this process is told to end; whether
    it was.

    Raises:
        What `launch` raises. KeyboardInterrupt: a second signal.
    """
    running, rung_s = Background(launch), 0.0
    with signals.installed():
        while running.runs():
            running.wait(_LOOK_EVERY_S)
            if not rung_s and signals.received() is Signal.STOP:
                rung_s = time.monotonic()
                ray.get(bell.ring.remote(), timeout=_ANSWER_S)
            if (
                rung_s
                and time.monotonic() - rung_s > _DEAF_S
                and not ray.get(bell.heard.remote(), timeout=_ANSWER_S)
            ):
                return True
    if running.error is not None and not rung_s:
        raise running.error
    return bool(rung_s)
