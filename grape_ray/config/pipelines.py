"""From the name of a pipeline to its frozen Config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial

from grape_ray.config.fields import FieldInfo
from grape_ray.config.modules import call, load_module, located
from grape_ray.config.parameters import parameters_of, taken
from grape_ray.config.run_file import ENDINGS, begun_with, read_run_file
from grape_ray.config.schema import Config
from grape_ray.errors import ConfigError, nearest

_RETURNS = "a function that returns a grape_ray.Config"
TASK_METHODS = ("load", "build_model", "collate", "per_example_loss", "evaluate", "save")
FIELDS = tuple(field.name for field in dataclasses.fields(Config))


def pipeline(reference: str, assignments: Iterable[str] = ()) -> Config:
    """The Config of a pipeline.

    Args:
        reference: a run file, `run.yaml`; or `module:function`; or a module whose function of the
            same last name (`pipelines.sst2` -> `sst2`), or else `config`, is meant; looked up in
            the current folder, too. A module may be given by its file, `folder/name.py`.
        assignments: `key=value` texts: of parameters of the function, such as `size=tiny`, and of
            fields of the Config that it returns, such as `method.rank=8`.

    Raises:
        ConfigError: no such module or function, it returns something else, or what is assigned is
            unknown or of another type.
    """
    function, written = _function(reference)
    arguments, fields = taken(function, written, FIELDS, f"{reference}:")
    given, others = taken(function, assignments, FIELDS)
    made = partial(function, **{**arguments, **given})
    config = _checked(call(made, f"pipeline {reference}", _RETURNS), reference)
    return config.override(fields, f"{reference}:").override(others)


def pipeline_parameters(reference: str, assignments: Iterable[str] = ()) -> list[FieldInfo]:
    """The parameters of a pipeline's function, with the values that it is called with; see
    `pipeline`.
    """
    function, written = _function(reference)
    arguments, _ = taken(function, [*written, *assignments], FIELDS)
    return parameters_of(function, arguments)


def _function(reference: str) -> tuple[Callable[..., object], list[str]]:
    """The function that makes a Config, and what a run file assigns to it."""
    if not reference.endswith(ENDINGS):
        return _in_module(reference), []
    base, assignments = begun_with(reference)
    return _in_module(base) if base else partial(read_run_file, reference), assignments


def _in_module(reference: str) -> Callable[..., object]:
    """The function of a module that a reference means. Raises ConfigError."""
    module, _, function_name = reference.partition(":")
    found = load_module(located(module), reference)
    for name in [function_name] if function_name else [found.__name__.rpartition(".")[2], "config"]:
        function = getattr(found, name, None)
        if callable(function):
            return function
    functions = [
        n
        for n, v in vars(found).items()
        if callable(v) and getattr(v, "__module__", "") == found.__name__
    ]
    near = nearest(function_name or found.__name__.rpartition(".")[2], functions)
    raise ConfigError("pipeline has no such function", reference, "module:function", near)


def _checked(config: object, reference: str) -> Config:
    """What a reference stands for, if it is a Config with a task."""
    if not isinstance(config, Config):
        fix = "return one, or name another function as module:function"
        raise ConfigError(f"pipeline {reference}", type(config).__name__, _RETURNS, fix)
    lacking = [
        name for name in TASK_METHODS if not callable(getattr(type(config.task), name, None))
    ]
    if lacking:
        got = f"{type(config.task).__name__} without {', '.join(lacking)}"
        expected = "an object with the methods of grape_ray.tasks.task.Task"
        raise ConfigError(
            f"the task of pipeline {reference}",
            got,
            expected,
            "write them: pipelines/digits_vit.py is an example",
        )
    return config
