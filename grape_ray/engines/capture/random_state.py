"""The random states that a forward pass draws from: taken, put back, compared."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch


def random_states(device: torch.device) -> list:
    """The states of torch's generators that a pass on `device` draws from, of NumPy's and of
    Python's.
    """
    found: list[tuple[Callable, object]] = [(torch.set_rng_state, torch.get_rng_state())]
    if device.type == "cuda":
        found.append(
            (
                lambda state: torch.cuda.set_rng_state(state, device),
                torch.cuda.get_rng_state(device),
            )
        )
    return [
        *found,
        (np.random.set_state, np.random.get_state()),
        (random.setstate, random.getstate()),
    ]


def set_states(states: list) -> None:
    """Puts back what `random_states` took."""
    for put, state in states:
        put(state)


def same_generators(before: list, after: list) -> bool:
    """Whether NumPy's and Python's global generators stand where they stood."""
    (_, numpy_before), (_, python_before) = before[-2:]
    (_, numpy_after), (_, python_after) = after[-2:]
    # the position first: it moves with each draw, the words behind it now and then
    moved = numpy_before[2] != numpy_after[2] or not np.array_equal(numpy_before[1], numpy_after[1])
    return not moved and python_before == python_after
