"""What Ray and the operating system tell a worker of its end, made one answer on every rank."""

from __future__ import annotations

import time
from typing import Any

from ray.train.torch import TorchConfig

from grape_ray.distributed.comms import Comms
from grape_ray.ray_backend.stop_signal import is_rung
from grape_ray.training import signals
from grape_ray.training.progress import Signal

_ASK_EVERY_S = 1.0
# below every shifted Signal, so that the largest over ranks is the gravest notice, and only then
# the wish to ask Ray
_ASK = 1


class Listening(TorchConfig):
    """A torch backend whose workers take their first SIGTERM for a notice: only an actor's main
    thread can set that up.
    """

    @property
    def backend_cls(self) -> Any:
        return _listening_backend(super().backend_cls)


def _listening_backend(torch_backend: Any) -> Any:
    class ListeningBackend(torch_backend):
        def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_training_start(worker_group, backend_config)
            worker_group.execute(_listen)

    return ListeningBackend


def _listen() -> None:
    signals.install()


class Notices:
    """Called after each step by every rank; the answer is the same on all.

    A worker that is told to end by SIGTERM ends the attempt after a checkpoint, and so does each
    when whoever launched the run rings the bell; then `stopped` says on rank 0 that no other
    attempt is wanted. A node that Ray drains brings a checkpoint, once a drain: Ray itself takes
    the workers away at the deadline and starts the next attempt without that node.
    """

    def __init__(self, comms: Comms, bell: Any):
        self._comms, self._asked_s, self._bell = comms, time.monotonic(), bell
        self._known: Any = None
        self.stopped = False

    def __call__(self, own: Signal) -> Signal:
        import ray.train

        now = time.monotonic()
        if self._comms.rank == 0 and now - self._asked_s >= _ASK_EVERY_S and is_rung(self._bell):
            self.stopped, own = True, Signal.STOP
        wish = _ASK if self._comms.rank == 0 and now - self._asked_s >= _ASK_EVERY_S else 0
        agreed = self._comms.largest(2 * max(own, signals.received()) + wish)
        if agreed > _ASK:
            return Signal(agreed // 2)
        if agreed == _ASK:
            self._asked_s = now
            found = ray.train.get_preemption_info()  # a call that Ray wants of every rank alike
            if found is not None and found != self._known:
                self._known = found
                return Signal.CHECKPOINT_NOW
        return Signal.NONE
