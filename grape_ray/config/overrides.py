"""`--set key=value`: a field of nested frozen dataclasses, parsed from text by its annotation."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from typing import Any

from grape_ray.errors import ConfigError, nearest

# As Python writes and as JSON reads them: they are parsed, so that the range check can refuse them
# with the range.
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def assign(node: Any, path: list[str], value: str, key: str, place: str = "--set") -> Any:
    """A copy of the dataclass `node` in which the field at `path` is parsed from `value`.

    Args:
        key: the whole path as the user wrote it, and place: where, for errors.

    Raises:
        ConfigError: an unknown key, with the nearest names; a group; a value of another type.
    """
    names = {f.name: f for f in dataclasses.fields(node)}
    path = [getattr(node, "renamed", {}).get(path[0], path[0]), *path[1:]]  # a former name
    if path[0] not in names:
        known = {".".join([*key.split(".")[: -len(path)], n]) for n in names}
        raise ConfigError(
            f"{at(place)} unknown key", key, "a field of the configuration", nearest(key, known)
        )
    current = getattr(node, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(current):
            raise ConfigError(
                f"{at(place)} unknown key",
                key,
                f"{path[0]} has no fields of its own",
                "name the field itself",
            )
        return dataclasses.replace(node, **{path[0]: assign(current, path[1:], value, key, place)})
    if dataclasses.is_dataclass(current):
        inner = ", ".join(f"{key}.{f.name}" for f in dataclasses.fields(current))
        raise ConfigError(
            f"{at(place)} a group is not a value",
            key,
            f"one of {inner}",
            "set its fields one by one",
        )
    hint = typing.get_type_hints(type(node))[path[0]]
    return dataclasses.replace(node, **{path[0]: parse_as(value, hint, f"{place} {key}")})


def parse(value: str, kind: type, field: str, place: str) -> Any:
    """A text as the value of a dataclass's field. Raises ConfigError for another type."""
    return parse_as(value, typing.get_type_hints(kind)[field], f"{place}.{field}")


def at(place: str) -> str:
    """Where something was written, as errors begin."""
    return place if place.endswith(":") else f"{place}:"


def parse_as(text: str, hint: Any, key: str) -> Any:
    """`text` as the annotated type: str as it is, everything else as JSON (`none` and comma lists
    allowed), one of some texts (`Literal`) as it is written there.

    Raises:
        ConfigError: it is of another type, or none of those texts; `key` says which.
    """
    if typing.get_origin(hint) is typing.Literal:
        known = typing.get_args(hint)
        if text not in known:
            raise ConfigError(key, text, "one of " + ", ".join(known), nearest(text, known))
        return text
    options = typing.get_args(hint) if typing.get_origin(hint) not in (None, tuple) else (hint,)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    for kind in options:
        origin = typing.get_origin(kind) or kind
        if origin is str:
            return text
        if origin is tuple:
            return tuple(parse_as(part, typing.get_args(kind)[0], key) for part in _parts(text))
        try:
            value = json.loads(
                text.lower()
                if origin is bool
                else _NOT_FINITE.get(text.lower(), text)
                if origin is float
                else text
            )
        except ValueError:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if origin is float and number and math.isfinite(value):
            return float(value)
        if isinstance(value, origin) and isinstance(value, bool) == (origin is bool):
            return value
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(key, text, f"a value of type {names}", "write it as in Python or JSON")


def _parts(text: str) -> list[str]:
    """The members of a list as texts: of one in JSON, or of one with commas, where `[!a]` is part
    of a pattern, not the list's own.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, list):
        return [member if isinstance(member, str) else json.dumps(member) for member in found]
    inner = text[1:-1] if text.startswith("(") and text.endswith(")") else text
    return [part.strip() for part in re.split(r",(?![^\[]*\])", inner) if part.strip()]
