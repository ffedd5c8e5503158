"""What a task's `evaluate` may give: numbers by name, of any library's scalar types, as plain
floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grape_ray.errors import ConfigError


def plain(found: object) -> dict[str, float]:
    """The metrics as floats; NaN and infinities are values like others.

    Args:
        found: a mapping from names to numbers: Python's, NumPy's, or tensors and arrays of one
            element.

    Raises:
        ConfigError: anything else; the error says the name and the type, and no value.

    >>> import numpy
    >>> plain({"accuracy": numpy.float32(0.5), "right": 7})
    {'accuracy': 0.5, 'right': 7.0}
    """
    if not isinstance(found, Mapping):
        raise ConfigError(
            "task.evaluate gave no metrics",
            type(found).__name__,
            "a mapping from names to numbers",
            "return a dict",
        )
    return {_name(name): _number(name, value) for name, value in found.items()}


def _name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise ConfigError(
            "a metric's name", type(name).__name__, "a text that is not empty", "name each metric"
        )
    return name


def _number(name: str, value: Any) -> float:
    what = f"metric {name!r}"
    expected = "a number, or a tensor or array of one"
    fix = "return float(...) of it"
    if value is None or isinstance(value, (str, bytes, complex)):
        raise ConfigError(what, type(value).__name__, expected, fix)
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass  # what they say may quote the value
    raise ConfigError(what, type(value).__name__, expected, fix)
