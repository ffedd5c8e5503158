"""Notices: being told from outside that this process is to end, and what the ranks of a run agree to do about it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from grape_ray.loop import Notice

_told = threading.Event()


def listen() -> Any:
    """From now on the first SIGTERM is a notice to end in good order; a second does what one did before. Main thread only.

    Returns:
        What handled the signal before.
    """
    _told.clear()
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        _told.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, handle)
    return before


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
        signal.signal(signal.SIGTERM, before)


def told() -> Notice:
    """What this process was told."""
    return Notice.STOP if _told.is_set() else Notice.NONE
