"""From the name of a pipeline to its frozen Config, and from a saved description back to a task."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable
from typing import Any

from grape_ray.config.modules import call, load_module, located
from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.config.trust import check_module, names
from grape_ray.errors import ConfigError, nearest
from grape_ray.storage import Json

_RETURNS = "a function that returns a grape_ray.Config"
TASK_METHODS = ("load", "build_model", "collate", "per_example_loss", "evaluate", "save")


def pipeline(reference: str) -> Config:
    """The Config of a pipeline.

    Args:
        reference: `module:function`, or a module whose function of the same last name
            (`pipelines.sst2` -> `sst2`), or else `config`, is meant; looked up in the current
            folder, too. A module may be given by its file, `folder/name.py`.

    Raises:
        ConfigError: no such module or function, or it returns something else.
    """
    module, _, function_name = reference.partition(":")
    found = load_module(located(module), reference)
    for name in [function_name] if function_name else [found.__name__.rpartition(".")[2], "config"]:
        function = getattr(found, name, None)
        if callable(function):
            return _called(function, reference)
    functions = [
        n
        for n, v in vars(found).items()
        if callable(v) and getattr(v, "__module__", "") == found.__name__
    ]
    near = nearest(function_name or found.__name__.rpartition(".")[2], functions)
    raise ConfigError("pipeline has no such function", reference, "module:function", near)


def _called(function: Any, reference: str) -> Config:
    """What a pipeline's function returns, if it is a Config."""
    config = call(function, f"pipeline {reference}", _RETURNS)
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


def describe_task(task: Any) -> Json:
    """A task as JSON values: where its class lives, and its fields."""
    kind = type(task)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": dataclasses.asdict(task)}


def check_description(config: Config) -> None:
    """Writes the description of a config and reads it back, as a resumed run will.

    Raises:
        ConfigError: a field of the task is no plain value, or comes back as another one, or the
            task's class cannot be found again.
    """
    task = config.task
    if not dataclasses.is_dataclass(task):
        raise ConfigError(
            "the task",
            type(task).__name__,
            "a dataclass of plain values",
            "decorate its class with @dataclass(frozen=True)",
        )
    for field in (field for field in dataclasses.fields(task) if field.init):
        try:
            json.dumps(getattr(task, field.name))
        except (TypeError, ValueError):
            raise _not_kept(field.name, getattr(task, field.name)) from None
    again = rebuild_config(json.loads(json.dumps(describe(config))), (type(task).__module__,))
    for field in dataclasses.fields(task):
        mine, theirs = getattr(task, field.name), getattr(again.task, field.name)
        if type(mine) is not type(theirs) or mine != theirs:
            raise _not_kept(field.name, mine)


def _not_kept(field: str, value: object) -> ConfigError:
    """The error for a field of a task that JSON does not give back as it was."""
    expected = (
        "text, a number, true or false, None, or lists and dicts (with texts as keys) of them"
    )
    fix = (
        "keep a path as text and a number as float(...); make anything else in load or build_model"
    )
    return ConfigError(
        f"task.{field} cannot be kept in run.json", type(value).__name__, expected, fix
    )


def rebuild_task(description: Json, trust: Iterable[str] = ()) -> Any:
    """The task that `describe_task` described.

    The description may come from anywhere, so it can name nothing but a task: a dataclass with the
    methods of `task.Task`, in the module that defines it, and only a module that is trusted
    (`trust.check_module`) is imported at all.

    Raises:
        ConfigError: a module that nobody has named, one that cannot be imported, no such task
            there, or one with other fields.
    """
    reference = description["class"]
    fields = description["fields"]
    trust = tuple(located(name, "trusted module") for name in trust)
    module_name, _, qualified = reference.partition(":")
    check_module(module_name, trust, "task")
    # The current folder may be the one that was copied from elsewhere; on the path, any file in it
    # could pass for a library.
    kind: Any = load_module(module_name, reference, "task", here=names(trust, module_name))
    fix = "call it where the run's own version can be imported"
    try:
        for part in qualified.split("."):
            kind = vars(kind)[part]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            "the task of the run cannot be rebuilt", reference, "a class of that module", fix
        ) from error
    if not _is_task(kind, module_name, qualified):
        expected = "a dataclass with the methods of grape_ray.tasks.task.Task, defined there"
        raise ConfigError(
            "the task of the run is no task",
            reference,
            expected,
            "do not use a description from strangers",
        )
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    if not isinstance(fields, dict) or not set(fields) <= known:
        raise ConfigError(
            "the task of the run cannot be rebuilt", reference, "a class with the saved fields", fix
        )
    hints = typing.get_type_hints(kind)
    kept = {
        k: tuple(v) if isinstance(v, list) and typing.get_origin(hints.get(k)) is tuple else v
        for k, v in fields.items()
    }
    try:
        return kind(**kept)
    except TypeError as error:
        raise ConfigError(
            "the task of the run cannot be rebuilt", reference, "a class with the saved fields", fix
        ) from error


def _is_task(kind: Any, module: str, qualified: str) -> bool:
    """Whether it is a dataclass, defined under that very name, with all methods of a task."""
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        return False
    return (kind.__module__, kind.__qualname__) == (module, qualified) and all(
        callable(getattr(kind, name, None)) for name in TASK_METHODS
    )


def rebuild_config(description: Json, trust: Iterable[str] = ()) -> Config:
    """The config that `describe` described.

    Args:
        trust: modules that may be imported for its task, beside this project's own.

    Raises:
        ConfigError: this version knows other fields, or see `rebuild_task`.
    """
    parts: Json = {}
    for name, kind in (("privacy", Privacy), ("method", Method), ("performance", Performance)):
        saved: Json = {
            k: tuple(v) if isinstance(v, list) else v for k, v in description.get(name, {}).items()
        }
        try:
            parts[name] = kind(**saved)
        except TypeError as error:
            fix = "resume with the version of grape-ray that began the run"
            raise ConfigError(
                f"the {name} settings of the run cannot be rebuilt",
                str(error),
                "fields of this version",
                fix,
            ) from error
    return Config(task=rebuild_task(description["task"], trust), seed=description["seed"], **parts)


def describe(config: Config) -> Json:
    """What decides a run's result, as JSON values; without `performance`, because it must
    not.
    """
    parts = {name: dataclasses.asdict(getattr(config, name)) for name in ("privacy", "method")}
    return {"task": describe_task(config.task), **parts, "seed": config.seed}
