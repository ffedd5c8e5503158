"""A channel between a trial and its run, which reports a score and waits for whether it goes on."""

from __future__ import annotations

import queue
import threading
from typing import Any

import ray

from grape_ray.storage import Json

Report = Json


class TrialChannel:
    """Between a trial and a run in a thread of the same process; safe to call from any thread."""

    def __init__(self) -> None:
        self._reports: queue.Queue[tuple[Report, queue.Queue[bool]]] = queue.Queue()
        self._answers_to: queue.Queue[bool] | None = None
        self._closed = threading.Event()

    def ask(self, report: Report) -> bool:
        """Sends a report, and waits for whether more steps are wanted."""
        answer: queue.Queue[bool] = queue.Queue(1)
        self._reports.put((report, answer))
        while not self._closed.is_set():
            try:
                # in pieces, so that a channel that closes meanwhile is noticed
                return answer.get(timeout=0.2)
            except queue.Empty:
                continue
        return False

    def next(self, timeout_s: float) -> Report | None:
        """The next report, or None where there is none in time."""
        try:
            report, self._answers_to = self._reports.get(timeout=timeout_s)
        except queue.Empty:
            return None
        return report

    def answer(self, more: bool) -> None:
        """Answers the last report; without one nothing happens.

        Each report has a queue of its own for the answer, so the answer to a worker that died
        meanwhile reaches nobody else.
        """
        if self._answers_to is not None:
            self._answers_to.put(more)
            self._answers_to = None

    def close(self) -> None:
        """Answers no to whoever asks, now and later."""
        self._closed.set()


class RemoteChannel:
    """The same between a trial and the Ray Train workers that it launched, through an actor."""

    def __init__(self) -> None:
        # Each waiting call holds a thread of the actor; calls of workers that died do, too.
        self._actor: Any = ray.remote(TrialChannel).options(num_cpus=0, max_concurrency=16).remote()
        self._pending: Any = None

    def ask(self, report: Report) -> bool:
        """See TrialChannel.ask; called on the worker of rank 0."""
        return ray.get(self._actor.ask.remote(report))

    def next(self, timeout_s: float) -> Report | None:
        """See TrialChannel.next."""
        self._pending = self._pending or self._actor.next.remote(timeout_s)
        ready, _ = ray.wait([self._pending], timeout=timeout_s + 1)
        if not ready:  # the same call is waited for next time: it may hold a report
            return None
        found: Any = ray.get(self._pending)
        self._pending = None
        return found

    def answer(self, more: bool) -> None:
        """See TrialChannel.answer."""
        ray.get(self._actor.answer.remote(more))

    def close(self) -> None:
        """See TrialChannel.close."""
        ray.get(self._actor.close.remote())

    def __reduce__(self) -> tuple[object, ...]:
        return _remote, (self._actor,)


def _remote(actor: Any) -> RemoteChannel:
    """The same channel in another process."""
    # not by the constructor, which would start an actor of its own
    channel = object.__new__(RemoteChannel)
    channel._actor, channel._pending = actor, None
    return channel
