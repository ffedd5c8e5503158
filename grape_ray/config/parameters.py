"""The parameters of a pipeline's function, such as `size`: `--set size=tiny` gives them, before the
fields of the Config that it returns are set.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterable

from grape_ray.config.fields import FieldInfo, type_name
from grape_ray.config.overrides import at, parse_as
from grape_ray.errors import ConfigError, nearest


def taken(
    function: Callable[..., object],
    assignments: Iterable[str],
    fields: Iterable[str],
    place: str = "--set",
) -> tuple[dict[str, object], list[str]]:
    """The arguments that assignments give a function, and the assignments that are left for what it
    returns: those with a dot in their key, or with the name of a field.

    Args:
        assignments: `key=value` texts. fields: of what the function returns. place: where the
            assignments were written, for errors.

    Raises:
        ConfigError: a key that is neither a parameter nor a field, with the nearest names; a value
            of another type.
    """
    hints, fields = _hints(function), tuple(fields)
    arguments: dict[str, object] = {}
    others = []
    for text in assignments:
        key, sign, value = (part.strip() for part in text.partition("="))
        if not sign or "." in key or key in fields:
            others.append(text)
        elif key in hints:
            arguments[key] = parse_as(value, hints[key], f"{place} {key}")
        else:
            known = [*hints, *fields]
            expected = "a field of the configuration"
            if hints:
                expected += f", or a parameter of the pipeline: {', '.join(hints)}"
            raise ConfigError(f"{at(place)} unknown key", key, expected, nearest(key, known))
    return arguments, others


def parameters_of(
    function: Callable[..., object], arguments: typing.Mapping[str, object]
) -> list[FieldInfo]:
    """The parameters of a function: names, types, values (where `arguments` give none, defaults),
    and what the `Args:` of its docstring says of them.
    """
    said = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")[2]
    text = " ".join(re.split(r"\n(?=\S)|\n\n", said)[0].split())
    hints, defaults = _hints(function), inspect.signature(function).parameters
    starts = [m for m in re.finditer(r"(?:^|(?<=[.;] ))(\w+): ", text) if m[1] in hints]
    ends = [*(m.start() for m in starts[1:]), len(text)]
    meanings = {m[1]: text[m.end() : end].strip() for m, end in zip(starts, ends)}
    return [
        FieldInfo(
            name,
            type_name(hint),
            arguments.get(name, defaults[name].default),
            meanings.get(name, ""),
        )
        for name, hint in hints.items()
    ]


def _hints(function: Callable[..., object]) -> dict[str, object]:
    """The parameters that may be given by name, and their types: as annotated, or that of the
    default.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {n: p for n, p in inspect.signature(function).parameters.items() if p.kind in named}
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # names that are imported for type checkers alone, or that are none
        hints = {}
    return {name: hints.get(name, _default_type(found[name])) for name in found}


def _default_type(parameter: inspect.Parameter) -> type:
    return str if parameter.default is inspect.Parameter.empty else type(parameter.default)
