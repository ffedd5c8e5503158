"""Notices: being told from outside that this process is to end, and what the ranks of a run agree
to do about it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from grape_ray.training.loop import Notice

# what ends a machine, and ^C: the run does the same for both
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_told = threading.Event()


def listen() -> dict[signal.Signals, Any]:
    """From now on the first SIGTERM or SIGINT is a notice to end in good order; a second does what
    it did before. Main thread only.

    Returns:
        What handled the signals before.
    """
    _told.clear()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def handle(number: int, frame: FrameType | None) -> None:
        _told.set()
        _restore(before)

    for number in _SIGNALS:
        signal.signal(number, handle)
    return before


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """`listen` for the time of the block, where the block runs in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = listen()
    try:
        yield
    finally:
        _restore(before)


def told() -> Notice:
    """What this process was told."""
    return Notice.STOP if _told.is_set() else Notice.NONE
