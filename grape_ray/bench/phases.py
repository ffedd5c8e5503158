"""Where a step's seconds go: each part of a step is wrapped, and counts the time that no part
inside it counts.

Nothing in the engines knows of it: what is wrapped are the step's own fields, the methods of
its collector (engines.collector) and torch's backward. Projections are found by their matrix: the
profile marks it, and times every product that it takes part in.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from grape_ray.bench.candidates import PrivateStep, Step
from grape_ray.bench.clock import clock
from grape_ray.engines.collector import Collector
from grape_ray.engines.ghost import TwoPasses

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

PHASES = (
    "forward", "backward", "per-example contraction", "projection", "norms", "weighted sum",
    "noise", "optimizer", "other",
)  # fmt: skip


class Stopwatch:
    """Exclusive seconds by phase: time inside a nested phase counts for that one alone."""

    def __init__(self, now: Callable[[], float]):
        self.seconds: dict[str, float] = defaultdict(float)
        self._now, self._stack, self._last = now, ["other"], now()

    @property
    def current(self) -> str:
        return self._stack[-1]

    def _turn(self) -> None:
        now = self._now()
        self.seconds[self.current] += now - self._last
        self._last = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time within for `name`."""
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def timed(self, name: str, function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
        """The function, timed."""

        def call(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
            with self.phase(name):
                return function(*args, **kwargs)

        return call


class Marked(Tensor):
    """A projection matrix that times the products it takes part in; its views and casts are marked,
    too.
    """

    watch: Stopwatch

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, Tensor)]
        watch = next(t for t in tensors if isinstance(t, Marked)).watch
        # the lift belongs to the update
        name = watch.current if watch.current == "optimizer" else "projection"
        with watch.phase(name), torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and all(isinstance(t, Marked) for t in tensors):
            return mark(out, watch)
        return out


def mark(matrix: Tensor, watch: Stopwatch) -> Tensor:
    """The matrix as a Marked one, sharing its memory."""
    with torch._C.DisableTorchFunctionSubclass():
        marked = matrix.as_subclass(Marked)
    marked.watch = watch
    return marked


def measure_phases(step: Step, device: str, steps: int) -> dict[str, float]:
    """Seconds a step in each of PHASES. The step's parts are wrapped for good: call it in a process
    that ends afterwards.
    """
    watch = Stopwatch(clock(device))
    backward = torch.autograd.backward
    _wrap(step, watch)
    torch.autograd.backward = watch.timed("backward", backward)
    try:
        step()  # as warm-up
        watch._turn()
        watch.seconds.clear()
        for _ in range(steps):
            step()
        watch._turn()
    finally:
        torch.autograd.backward = backward
    return {name: watch.seconds[name] / steps for name in PHASES}


def _wrap(step: Any, watch: Stopwatch) -> None:
    """Wraps what the step is made of."""
    step.loss = watch.timed("forward", step.loss)
    if not isinstance(step, PrivateStep):
        if hasattr(step, "optimizer"):
            step.optimizer.step = watch.timed("optimizer", step.optimizer.step)
        return
    step.privatize = watch.timed("noise", step.privatize)
    step.optimizer.step = watch.timed("optimizer", step.optimizer.step)
    engine: Any = step.engine
    if hasattr(engine.subspace, "direction"):  # of method dp_zero
        draw = engine.subspace.direction
        engine.subspace.direction = lambda *args: watch.timed(_making(watch), draw)(*args)
    matrix = engine.subspace.matrix
    engine.subspace.matrix = lambda *args: mark(watch.timed(_making(watch), matrix)(*args), watch)
    make_collector = engine._make_collector
    engine._make_collector = lambda *args: _wrap_collector(make_collector(*args), watch)


def _making(watch: Stopwatch) -> str:
    """The phase that pays for a matrix or a direction: the update's own if it asks, else
    projection.
    """
    return watch.current if watch.current == "optimizer" else "projection"


def _wrap_collector(collector: Collector, watch: Stopwatch) -> Collector:
    """Wraps the sink's verbs. A sink of two passes takes norms in the first and sums in the second,
    on the spot.
    """
    taking = "weighted sum" if isinstance(collector, TwoPasses) else "per-example contraction"
    names = {
        "pair": taking,
        "affine": taking,
        "dense": taking,
        "squared_norms": "norms",
        "_squared": "norms",
        "weighted_sum": "weighted sum",
    }
    for verb, phase in names.items():
        if hasattr(collector, verb):
            setattr(collector, verb, watch.timed(phase, getattr(collector, verb)))
    return collector
