"""Puts tracked tensors in the place of the parameters for one pass; the model object stays the
user's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn
from torch.distributed.tensor import DTensor

from grape_ray.distributed import sharding
from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.model_state import ModelSnapshot
from grape_ray.engines.capture.tap import bypassed
from grape_ray.engines.capture.tracked import Node, Tracked


class Slot(NamedTuple):
    """A place in a module where a parameter is held."""

    module: nn.Module
    key: str
    name: str
    param: nn.Parameter


def _slots(model: nn.Module, params: Mapping[str, nn.Parameter]) -> list[Slot]:
    """The places in which `params` are held; a tied one has several."""
    names = {id(param): name for name, param in params.items()}
    return [
        Slot(module, key, names[id(param)], param)
        for module in model.modules()
        for key, param in module._parameters.items()
        if param is not None and id(param) in names
    ]


@contextlib.contextmanager
def replaced(
    model: nn.Module, params: Mapping[str, nn.Parameter], values: Mapping[str, nn.Parameter]
) -> Iterator[None]:
    """Puts `values` in the places of `params`, and the parameters back afterwards, whatever
    happens; they are never written to.
    """
    slots = _slots(model, params)
    try:
        for slot in slots:
            slot.module._parameters[slot.key] = values[slot.name]
        yield
    finally:
        for slot in slots:
            slot.module._parameters[slot.key] = slot.param


def _swap_in(capture: CapturePass, slots: list[Slot]) -> None:
    """Puts a tracked tensor into every slot that holds a whole tensor; a tied one is the same
    everywhere.
    """
    made: dict[int, Tracked] = {}
    for slot in slots:
        value = slot.module._parameters[slot.key]
        # rows that are not gathered yet: their turn comes when their block is entered
        if value is None or isinstance(value, (Tracked, DTensor)):
            continue
        if id(value) not in made:
            # shares the parameter's memory, and takes gradients in its place
            leaf = value.detach().requires_grad_()
            made[id(value)] = capture.track(Node(leaf, {slot.name: leaf}, slot.name))
        slot.module._parameters[slot.key] = made[id(value)]  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def tracking(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    capture: CapturePass,
    snapshot: ModelSnapshot,
) -> Iterator[None]:
    """Swaps tracked tensors for `params` into the model's modules, and the parameters back
    afterwards, whatever happens.

    A sharded model's weights are there only while their block runs, so their tracked tensors
    are made anew each time it is entered.

    Raises:
        UnsupportedLayer: a parameter received an ordinary gradient, so the model reached it past
            the engine; or the pass has written to what is not trained.
    """
    slots = _slots(model, params)
    grads = {name: p.grad for name, p in params.items()}
    gated = dict(sharding.gates(model))
    try:
        for param in params.values():
            # so that a gradient found afterwards is of this pass, which went past the engine
            param.grad = None
        # inner blocks come later and win
        owners = {part: gate for module, gate in gated.items() for part in module.modules()}
        for gate in gated.values():
            gate.watcher = functools.partial(
                _swap_in, capture, [s for s in slots if owners[s.module] is gate]
            )
        if not gated:
            _swap_in(capture, slots)
            _flat_weights(model)
        yield
        leaked = [name for name, p in params.items() if p.grad is not None]
    finally:
        for gate in gated.values():
            gate.watcher = None
        sharding.close(model)
        for slot in slots:
            slot.module._parameters[slot.key] = slot.param
        for name, param in params.items():
            param.grad = grads[name]
        if not gated:  # FSDP keeps state of its own in attributes
            snapshot.restore_attributes()
    # only now, when the model is the user's again, whatever is raised
    capture.check_leaks()
    if leaked:
        raise bypassed(f"'{leaked[0]}'")
    snapshot.check()


def _flat_weights(model: nn.Module) -> None:
    """Recurrent layers keep their weights a second time, in a list; the attribute is put back with
    all others.
    """
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            object.__setattr__(
                module,
                "_flat_weights",
                [module._parameters[name] for name in module._flat_weights_names],
            )
