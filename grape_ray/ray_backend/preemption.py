"""Preemption: what the launcher, the operating system and Ray say of a worker's end, made one
decision on every rank.
"""

from __future__ import annotations

import time
from typing import Any

from ray.train.torch import TorchConfig

from grape_ray.distributed.comms import Comms
from grape_ray.ray_backend.stop_signal import is_set
from grape_ray.training import signals
from grape_ray.training.progress import Signal

_POLL_S = 1.0
# Rank 0's wish that all ranks ask Ray. Signals are doubled, so every one of them is larger, and the
# maximum over ranks is the gravest signal, or else the wish.
_ASK_RAY = 1


class SignalTorchConfig(TorchConfig):
    """Ray Train's torch backend, whose workers also handle SIGTERM: only the main thread of an
    actor can install a handler, and the training function runs in another.
    """

    @property
    def backend_cls(self) -> type:
        return _with_handlers(super().backend_cls)


def _with_handlers(torch_backend: Any) -> type:
    class SignalBackend(torch_backend):
        def on_training_start(self, worker_group: Any, backend_config: object) -> None:
            super().on_training_start(worker_group, backend_config)
            worker_group.execute(_install_handlers)

    return SignalBackend


def _install_handlers() -> None:
    signals.install()


class PreemptionWatcher:
    """Called after each step by every rank; the answer is the same on all (`agree_on_signal`).

    * SIGTERM to a worker ends the attempt after a checkpoint.
    * The launcher's stop signal does the same, and `stopped` is then true on rank 0: no other
      attempt is wanted.
    * A node that Ray drains brings a checkpoint, one a drain. Ray itself takes the workers away at
      the deadline and starts the next attempt without that node.

    Args:
        stop: see `make_stop_signal`.
    """

    def __init__(self, comms: Comms, stop: Any):
        self._comms, self._stop = comms, stop
        self._polled_s = time.monotonic()
        self._known_drain: object = None
        self.stopped = False

    def __call__(self, own: Signal) -> Signal:
        import ray.train

        now = time.monotonic()
        # one rank asks the actor, and the maximum below tells the others
        poll = self._comms.rank == 0 and now - self._polled_s >= _POLL_S
        if poll and is_set(self._stop):
            self.stopped, own = True, Signal.STOP
        wish = _ASK_RAY if poll else 0
        agreed = self._comms.largest(2 * max(own, signals.received()) + wish)
        if agreed > _ASK_RAY:
            return Signal(agreed // 2)
        if agreed == _ASK_RAY:
            self._polled_s = now
            drain = ray.train.get_preemption_info()  # a collective: Ray wants it of every rank
            if drain is not None and drain != self._known_drain:
                self._known_drain = drain
                return Signal.CHECKPOINT_NOW
        return Signal.NONE
