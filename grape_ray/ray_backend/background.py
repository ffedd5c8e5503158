"""A call in a thread of its own, that another thread watches."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Begins `call` in a daemon thread.

    Attributes:
        error: what it has raised; None while it runs, and where it returned.
    """

    def __init__(self, call: Callable[[], object]):
        self._call = call
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)
        self._thread.start()

    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Waits for its end, but no longer than that."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._call()
        # whoever waits decides what an exit or an interrupt means
        except BaseException as error:
            self.error = error
