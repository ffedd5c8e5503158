"""The fields of a configuration: names, types, values, and what their docstrings say."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class FieldInfo:
    """One field, or parameter of a pipeline, that `--set` and run files can set.

    Attributes:
        key: its whole name, such as `privacy.epsilon`. type: as text. value: as it is.
        meaning: what the docstring of its class says; empty where that says nothing.
    """

    key: str
    type: str
    value: object
    meaning: str


def fields_of(node: Any, prefix: str = "") -> Iterator[FieldInfo]:
    """The fields of a dataclass and of the groups in it, in their order."""
    hints = typing.get_type_hints(type(node))
    meanings = _meanings(type(node))
    for field in dataclasses.fields(node):
        if not field.init:
            continue
        key, value = f"{prefix}{field.name}", getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{key}.")
        else:
            yield FieldInfo(key, type_name(hints[field.name]), value, meanings.get(field.name, ""))


def type_name(hint: Any) -> str:
    """A type as text; of one of some texts, these."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _meanings(kind: type) -> dict[str, str]:
    """What the `Attributes:` of a class and of those it is made from say of each field."""
    found: dict[str, str] = {}
    names = {field.name for field in dataclasses.fields(kind)}
    # `name: text`, `one, other: text`, at the beginning of a line or after a full stop
    start = re.compile(r"(?:^|(?<=[.;] ))((?:\w+, )*\w+): ")
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")[2]
        joined = " ".join(text.split())
        heads = [m for m in start.finditer(joined) if set(m[1].split(", ")) <= names]
        for head, after in zip(heads, [*heads[1:], None]):
            said = joined[head.end() : after.start() if after else None].strip()
            found.update(dict.fromkeys(head[1].split(", "), said))
    return found
