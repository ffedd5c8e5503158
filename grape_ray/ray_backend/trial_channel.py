"""Question and answer between a run and the trial that watches it: the run reports a score and
waits to hear whether it goes on.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

import ray

Report = dict[str, Any]


class Talk:
    """Between a run in a thread and the trial of the same process; safe to call from any thread."""

    def __init__(self) -> None:
        self._reports: queue.Queue[tuple[Report, queue.Queue[bool]]] = queue.Queue()
        self._asker: queue.Queue[bool] | None = None
        self._over = threading.Event()

    def ask(self, report: Report) -> bool:
        """Hands a report over, and waits for whether more steps are wanted."""
        answer: queue.Queue[bool] = queue.Queue(1)
        self._reports.put((report, answer))
        while not self._over.is_set():
            try:
                return answer.get(timeout=0.2)
            except queue.Empty:
                continue
        return False

    def next(self, timeout_s: float) -> Report | None:
        """The next report, or None where there is none in time."""
        try:
            report, self._asker = self._reports.get(timeout=timeout_s)
        except queue.Empty:
            return None
        return report

    def answer(self, go_on: bool) -> None:
        """Answers the last report; without one nothing happens. An asker that died meanwhile hears
        nothing, and takes no other's answer.
        """
        if self._asker is not None:
            self._asker.put(go_on)
            self._asker = None

    def close(self) -> None:
        """Answers no to whoever asks, now and later."""
        self._over.set()


class RemoteTalk:
    """The same, between a run on Ray Train workers and the trial that launched them."""

    def __init__(self) -> None:
        # Asking blocks a thread of the actor for as long as the trial thinks; askers that died are
        # few.
        actor: Any = ray.remote(Talk)
        self._desk: Any = actor.options(num_cpus=0, max_concurrency=16).remote()
        self._pending: Any = None

    def ask(self, report: Report) -> bool:
        """See Talk.ask; called on the worker of rank 0."""
        return ray.get(self._desk.ask.remote(report))

    def next(self, timeout_s: float) -> Report | None:
        """See Talk.next."""
        self._pending = self._pending or self._desk.next.remote(timeout_s)
        ready, _ = ray.wait([self._pending], timeout=timeout_s + 1)
        if not ready:
            return None
        found: Any = ray.get(self._pending)
        self._pending = None
        return found

    def answer(self, go_on: bool) -> None:
        """See Talk.answer."""
        ray.get(self._desk.answer.remote(go_on))

    def close(self) -> None:
        """See Talk.close."""
        ray.get(self._desk.close.remote())

    def __reduce__(self) -> Any:
        return _remote, (self._desk,)


def _remote(desk: Any) -> RemoteTalk:
    """The same talk in another process."""
    talk = object.__new__(RemoteTalk)
    talk._desk, talk._pending = desk, None
    return talk
