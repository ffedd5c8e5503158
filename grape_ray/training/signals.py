"""Signals from outside that ask this process to end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from grape_ray.training.loop import Signal

# What ends a machine, and ^C: a run does the same for both.
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_received = threading.Event()
# what `signal.getsignal` gives
Handlers = dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None]


def install() -> Handlers:
    """From now on the first SIGTERM or SIGINT asks the run to end gracefully; a second does what it
    did before. Main thread only.

    Returns:
        What handled the signals before.
    """
    _received.clear()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def handle(number: int, frame: FrameType | None) -> None:
        _received.set()
        # a second one finds the handler that was there, which ends the process
        _restore(before)

    for number in _SIGNALS:
        signal.signal(number, handle)
    return before


def _restore(handlers: Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """`install` for the time of the block, where the block runs in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = install()
    try:
        yield
    finally:
        _restore(before)


def received() -> Signal:
    """What this process was asked for."""
    return Signal.STOP if _received.is_set() else Signal.NONE
