"""A pass verified by value: whose rows are whose, that no example notices the others, and that nothing is remembered.

The proof of a clipped sum needs each loss to be a function of its own example alone, and each tap to credit gradients to the example
that they come from. Neither is believed. Of a forward pass that has just been made:

* *ownership*: the losses of a group of examples go backward alone; every tap must then receive exact zeros in the rows of all others.
* *no company, no shared luck*: the pass is repeated with the other examples exchanged, and the random numbers that do not visibly belong
  to an example; the losses of the rest must not change by a single bit.
* *no memory*: that repetition comes after passes over other examples, and no untrained tensor may have changed.
* *no counting*: a part of the batch alone must give the same losses, up to rounding, since shapes differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from grape_ray.engines import owners
from grape_ray.engines.dependence import Company, Dependence, Undropped
from grape_ray.engines.session import Phase, Reroute, Session, Tap
from grape_ray.engines.state import Watch, written
from grape_ray.engines.tracked import Tracked
from grape_ray.errors import UnsupportedLayer

_FEW = 8  # examples that are all told apart
_EXTREME = 64.0  # what real-valued inputs of the others are multiplied by, so that little company shows as well


def ownership(session: Session, losses: Tensor, thorough: bool) -> None:
    """Finds the layout of every tap that has none, and checks those that have one, by exact zeros.

    Args:
        thorough: tell every two of a few examples apart, and of more than that two random halves from the rest, in at most six backward
            passes; otherwise one random half, in two.

    Raises:
        UnsupportedLayer: gradients of one example arrive in rows that belong to another, or in no regular place.
        Reroute: that can be because shared values meet the batch another way than their sizes suggest.
    """
    if not losses.requires_grad or session.rows == 1:
        return
    if not thorough:
        groups = owners.random_halves(session.rows)
    elif session.rows <= _FEW:
        groups = owners.every_pair(session.rows)
    else:
        groups = torch.cat([owners.random_halves(session.rows), owners.random_halves(session.rows)])
    kept = [_witnesses(session, losses, group) for group in groups]
    wrong: list[Tap] = []
    for tap, evidence in zip(session.taps, zip(*kept)):
        stacked = torch.stack(evidence).cpu()
        if tap.layout is None:
            tap.layout = owners.resolve(stacked, groups)
            fits = tap.layout is not None
        else:
            fits = owners.agrees(tap.layout, stacked, groups)
        if not fits:
            wrong.append(tap)
    ways = {tap.way for tap in wrong if tap.way is not None and tap.way not in session.inside}
    if ways:
        raise Reroute(ways)
    if wrong:
        raise _not_owned(wrong[0], session.rows)


def _witnesses(session: Session, losses: Tensor, group: Tensor) -> list[Tensor]:
    """For every tap, where the losses of one group bring a gradient that is not zero."""
    for tap in session.taps:
        tap.evidence.clear()
    session.phase = Phase.VERIFY
    try:
        torch.autograd.backward(losses, group.to(losses.device, losses.dtype), retain_graph=True)
    except RuntimeError as error:
        raise UnsupportedLayer(
            "the backward pass", str(error).splitlines()[0], "a forward pass that torch can go back through", "do not write in place"
        ) from error
    finally:
        session.phase = Phase.FORWARD
    session.check_leaks()
    found = []
    for tap in session.taps:
        nothing = torch.zeros(tap.lead, dtype=torch.bool, device=losses.device)
        found.append(torch.stack(tap.evidence).any(0) if tap.evidence else nothing)
        tap.evidence.clear()
    return found


def _not_owned(tap: Tap, rows: int) -> UnsupportedLayer:
    return UnsupportedLayer(
        f"operation '{tap.key[1]}' on parameter {tap.key[0]}",
        f"rows {tap.lead} in which gradients of several of {rows} examples meet",
        "rows that each belong to one example, in a regular order (batch-first, view after view, or time-major)",
        "freeze the parameter (requires_grad=False), or keep examples in order and apart",
    )


class Repetition:
    """A forward pass that can be made again: the same random numbers, and other examples beside the same ones.

    Args:
        forward: (batch, B) -> losses (B,). state: random states from before the pass (`random_states`).
        constants: see `dependence.Dependence`.
        tolerance: of a comparison where shapes differ, relative to the largest loss.
    """

    def __init__(self, forward: Callable[[Any, int], Tensor], batch: Any, rows: int, state: list, constants: set[int], tolerance: float):
        self._forward, self._batch, self._rows = forward, batch, rows
        self._state, self._constants, self._tolerance = state, constants, tolerance

    def check(self, losses: Tensor, watch: Watch, seen: Dependence, thorough: bool) -> None:
        """Raises UnsupportedLayer where an example's loss depends on company, on luck that is shared, or on what came before."""
        before = random_states(losses.device)
        try:
            contents = watch.contents()
            self._compare(losses, seen, thorough)
            for name, content in watch.contents().items():
                if contents.get(name) != content:
                    raise written(name)
        finally:
            set_states(before)

    def _compare(self, losses: Tensor, seen: Dependence, thorough: bool) -> None:
        halves = owners.random_halves(self._rows) if self._rows > 1 else torch.zeros(1, 1, dtype=torch.bool)
        met = [(~others, self._among(others, high=bool(number))) for number, others in enumerate(halves[: 2 if thorough else 1])]
        plain = self._losses(self._batch)
        if not _same_generators(self._state, random_states(losses.device)):
            raise UnsupportedLayer(
                "a random number in the forward pass",
                "one of NumPy's or Python's global generator",
                "random numbers of torch, which are drawn for each example and repeat with the step",
                "draw it with torch",
            )
        for kept, among in met:
            if not _same(plain[kept], among[kept]):
                self._explain(plain, among, kept, seen.drew)
        self._close("the loss of an example by the engine's rules", losses.detach(), plain, torch.ones(self._rows, dtype=torch.bool))
        if self._rows > 1 and not seen.drew:  # in a smaller batch the same draws would be other examples'
            self._count(plain, halves[0], seen.masked)

    def _count(self, plain: Tensor, half: Tensor, masked: bool) -> None:
        """Compares the losses of some examples in the whole batch and in one of their own; without dropout, whose masks differ."""
        picked = half.nonzero().squeeze(1)
        undropped = self._losses(self._batch, watching=Undropped()) if masked else plain
        few = tree_map(lambda t: t[picked.to(t.device)] if isinstance(t, Tensor) else t, _plain(self._batch))
        alone = self._losses(few, len(picked), Undropped())
        whole = torch.zeros_like(plain)
        whole[picked] = alone
        self._close("the loss of an example", undropped, whole, half)

    def _among(self, others: Tensor, high: bool, luck: bool = True) -> Tensor:
        """The losses with `others` exchanged, and their luck; where a model fails on what that gives, with less exchanged."""
        watching = Company(self._rows, self._constants, Tracked, others, high) if luck else None
        if high:
            with suppress(RuntimeError, ValueError, IndexError, AssertionError):
                return self._losses(self._exchanged(others, _EXTREME), watching=watching)
        return self._losses(self._exchanged(others, 1.0), watching=watching)

    def _exchanged(self, others: Tensor, scale: float) -> Any:
        """The batch with each of `others` replaced by one of the rest; 0/1 masks stay, since models take other paths where none is 0."""
        rest = (~others).nonzero().squeeze(1)
        source = torch.arange(self._rows)
        source[others] = rest[torch.arange(int(others.sum())) % len(rest)]

        def exchange(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or (leaf.ndim > 1 and _is_mask(leaf)):
                return leaf
            out = leaf[source.to(leaf.device)]
            if leaf.is_floating_point() and scale != 1.0:
                out[others.to(leaf.device)] *= scale
            return out

        return tree_map(exchange, _plain(self._batch))

    def _losses(self, batch: Any, rows: int | None = None, watching: TorchFunctionMode | None = None) -> Tensor:
        set_states(self._state)
        context: AbstractContextManager = watching if watching is not None else nullcontext()
        with torch.no_grad(), context:
            return self._forward(batch, rows or self._rows).detach()

    def _explain(self, plain: Tensor, among: Tensor, kept: Tensor, drew: bool) -> None:
        """Says why losses differ; a difference that rounding explains where the model itself is not reproducible is none."""
        again = self._losses(self._batch)
        noise = _distance(plain, again)
        if noise > 0:
            if noise <= self._tolerance:
                self._close("the loss of an example", plain, among, kept)
                return
            raise UnsupportedLayer(
                "the loss of an example",
                "another value when the same examples come again",
                "a forward pass that remembers nothing of earlier ones",
                "let the model write no state, and draw random numbers from torch's generator alone",
            )
        if drew and _same(plain[kept], self._among(~kept, high=False, luck=False)[kept]):
            raise UnsupportedLayer(
                "a random number in the forward pass",
                "one that several examples share",
                "draws of its own for each example (a mask a row)",
                "use a drop path a row (mode='row'), or set its probability to 0",
            )
        raise UnsupportedLayer(
            "the loss of an example",
            "another value beside other examples",
            "a function of that example alone",
            "let the model look at no other example: no batch statistics, no mixing, no capacity that examples share",
        )

    def _close(self, what: str, a: Tensor, b: Tensor, where: Tensor) -> None:
        if _distance(a[where], b[where]) > self._tolerance:
            raise UnsupportedLayer(
                what,
                f"{_distance(a[where], b[where]):.1e} away from its value "
                + ("by torch alone" if "rules" in what else "in a smaller batch"),
                f"at most {self._tolerance:g}, relative",
                "let no loss depend on the number of examples, and keep examples in the first dimension",
            )


def random_states(device: torch.device) -> list:
    """The states of torch's generators that a pass on `device` draws from, of NumPy's and of Python's."""
    found: list[tuple[Callable, Any]] = [(torch.set_rng_state, torch.get_rng_state())]
    if device.type == "cuda":
        found.append((lambda state: torch.cuda.set_rng_state(state, device), torch.cuda.get_rng_state(device)))
    return [*found, (np.random.set_state, np.random.get_state()), (random.setstate, random.getstate())]


def set_states(states: list) -> None:
    for put, state in states:
        put(state)


def _same_generators(before: list, after: list) -> bool:
    """Whether NumPy's and Python's global generators stand where they stood."""
    (_, numpy_before), (_, python_before) = before[-2:]
    (_, numpy_after), (_, python_after) = after[-2:]
    moved = numpy_before[2] != numpy_after[2] or not np.array_equal(numpy_before[1], numpy_after[1])
    return not moved and python_before == python_after


def _plain(batch: Any) -> Any:
    return dict(batch) if hasattr(batch, "keys") else batch


def _is_mask(leaf: Tensor) -> bool:
    return leaf.dtype == torch.bool or (not leaf.is_floating_point() and not leaf.is_complex() and bool(((leaf == 0) | (leaf == 1)).all()))


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (torch.isnan(a) & torch.isnan(b))).all())


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest entry; where either is not finite both must be."""
    if not a.numel():
        return 0.0
    finite = torch.isfinite(a) & torch.isfinite(b)
    if not bool((torch.isfinite(a) == torch.isfinite(b)).all()):
        return float("inf")
    difference, scale = (a - b)[finite].double().abs(), a[finite].double().abs()
    return float(difference.max() / max(float(scale.max()), 1.0)) if difference.numel() else 0.0
