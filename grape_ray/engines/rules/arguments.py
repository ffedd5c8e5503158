"""Arguments of calls, as handlers need them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from grape_ray.engines.capture.torch_functions import Call
from grape_ray.engines.capture.tracked import Tracked


def bind(call: Call, names: str, **defaults: object) -> list[Any]:
    """The values of a call's arguments, in the order of `names`, given by position or by keyword.

    Args:
        names: of the function's parameters in its own order, separated by spaces. defaults: of
            those that may be left out; None where none is named.
    """
    listed = names.split()
    given = dict(zip(listed, call.args)) | call.kwargs
    return [given.get(name, defaults.get(name)) for name in listed]


def learned_elsewhere(*values: object) -> bool:
    """Whether a weight that is not tracked has a gradient of its own, such as one that the batch
    itself computes.
    """
    return any(
        isinstance(v, Tensor) and not isinstance(v, Tracked) and v.requires_grad for v in values
    )
