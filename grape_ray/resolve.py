"""From the name of a pipeline to its frozen Config, and from a saved description back to a task."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import pkgutil
import sys
import typing
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from grape_ray.config import Config, Method, Performance, Privacy
from grape_ray.errors import ConfigError, nearest
from grape_ray.trust import check_module, names

TASK_METHODS = ("load", "build_model", "collate", "per_example_loss", "evaluate", "save")


def pipeline(reference: str) -> Config:
    """The Config of a pipeline.

    Args:
        reference: `module:function`, or a module whose function of the same last name (`pipelines.sst2` -> `sst2`), or else
            `config`, is meant; looked up in the current folder, too.

    Raises:
        ConfigError: no such module or function, or it returns something else.
    """
    module_name, _, function_name = reference.partition(":")
    module = load_module(module_name, reference)
    for name in [function_name] if function_name else [module_name.rpartition(".")[2], "config"]:
        function = getattr(module, name, None)
        if callable(function):
            config = function()
            if not isinstance(config, Config):
                raise ConfigError(f"pipeline {reference}", type(config).__name__, "a function that returns a grape_ray.Config")
            return config
    functions = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
    raise ConfigError("pipeline has no such function", reference, "module:function", nearest(function_name or module_name, functions))


def load_module(name: str, reference: str, kind: str = "pipeline", here: bool = True) -> ModuleType:
    """The module, from the path or, if `here`, from the current folder before that.

    Raises:
        ConfigError: it cannot be imported; the error calls it by its kind.
    """
    if here and os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            what = f"{kind} {reference} needs a module"
            raise ConfigError(what, error.name, "an installed module", f"pip install {error.name}") from error
        raise ConfigError(f"{kind} not found", reference, "an importable module", nearest(name, _neighbours(name, kind))) from error
    except (ImportError, SyntaxError, ValueError, TypeError) as error:
        raise ConfigError(f"{kind} cannot be imported", reference, "an importable module", f"{type(error).__name__}: {error}") from error


def _neighbours(name: str, kind: str) -> list[str]:
    """Modules beside the one that is missing; where a bare name is missing, those beside the kind's own examples."""
    example = "tune_spaces.digits" if kind == "tune space" else "pipelines.digits_vit"
    package = (name.rpartition(".")[0] or example).split(".")[0]
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    return [f"{package}.{m.name}" for m in pkgutil.iter_modules(places)] or [example]


def describe_task(task: Any) -> dict[str, Any]:
    """A task as JSON values: where its class lives, and its fields."""
    kind = type(task)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": dataclasses.asdict(task)}


def check_description(config: Config) -> None:
    """Writes the description of a config and reads it back, as a resumed run will.

    Raises:
        ConfigError: a field of the task is no plain value, or comes back as another one, or the task's class cannot be found again.
    """
    task = config.task
    if not dataclasses.is_dataclass(task):
        raise ConfigError("the task", type(task).__name__, "a dataclass of plain values", "decorate its class with @dataclass(frozen=True)")
    for field in dataclasses.fields(task):
        if field.init:
            _check_kept(f"task.{field.name}", getattr(task, field.name))
    again = rebuild_config(json.loads(json.dumps(describe(config))), (type(task).__module__,))
    for field in dataclasses.fields(task):
        mine, theirs = getattr(task, field.name), getattr(again.task, field.name)
        if type(mine) is not type(theirs) or mine != theirs:
            _check_kept(f"task.{field.name}", mine, strict=True)


def _check_kept(what: str, value: Any, strict: bool = False) -> None:
    """Refuses what JSON does not keep. Raises ConfigError."""
    expected = "text, a number, true or false, None, or lists and dicts (with texts as keys) of them"
    fix = "keep a path as text and a number as float(...); make anything else in load or build_model"
    try:
        kept = not strict and json.dumps(value) and True
    except (TypeError, ValueError):
        kept = False
    if not kept:
        raise ConfigError(f"{what} cannot be kept in run.json", type(value).__name__, expected, fix)


def rebuild_task(description: Mapping[str, Any], trust: Iterable[str] = ()) -> Any:
    """The task that `describe_task` described.

    The description may come from anywhere, so it can name nothing but a task: a dataclass with the methods of `task.Task`, in the module
    that defines it, and only a module that is trusted (`trust.check_module`) is imported at all.

    Raises:
        ConfigError: a module that nobody has named, one that cannot be imported, no such task there, or one with other fields.
    """
    reference, fields, trust = description["class"], description["fields"], tuple(trust)
    module_name, _, qualified = reference.partition(":")
    check_module(module_name, trust, "task")
    # The current folder may be the one that was copied from elsewhere; on the path, any file in it could pass for a library.
    kind: Any = load_module(module_name, reference, "task", here=names(trust, module_name))
    fix = "call it where the run's own version can be imported"
    try:
        for part in qualified.split("."):
            kind = vars(kind)[part]
    except (KeyError, TypeError) as error:
        raise ConfigError("the task of the run cannot be rebuilt", reference, "a class of that module", fix) from error
    if not _is_task(kind, module_name, qualified):
        expected = "a dataclass with the methods of grape_ray.task.Task, defined there"
        raise ConfigError("the task of the run is no task", reference, expected, "do not use a description from strangers")
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    if not isinstance(fields, dict) or not set(fields) <= known:
        raise ConfigError("the task of the run cannot be rebuilt", reference, "a class with the saved fields", fix)
    hints = typing.get_type_hints(kind)
    kept = {k: tuple(v) if isinstance(v, list) and typing.get_origin(hints.get(k)) is tuple else v for k, v in fields.items()}
    try:
        return kind(**kept)
    except TypeError as error:
        raise ConfigError("the task of the run cannot be rebuilt", reference, "a class with the saved fields", fix) from error


def _is_task(kind: Any, module: str, qualified: str) -> bool:
    """Whether it is a dataclass, defined under that very name, with all methods of a task."""
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        return False
    return (kind.__module__, kind.__qualname__) == (module, qualified) and all(callable(getattr(kind, name, None)) for name in TASK_METHODS)


def rebuild_config(description: Mapping[str, Any], trust: Iterable[str] = ()) -> Config:
    """The config that `describe` described.

    Args:
        trust: modules that may be imported for its task, beside this project's own.

    Raises:
        ConfigError: this version knows other fields, or see `rebuild_task`.
    """
    parts: dict[str, Any] = {}
    for name, kind in (("privacy", Privacy), ("method", Method), ("performance", Performance)):
        saved: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in description.get(name, {}).items()}
        try:
            parts[name] = kind(**saved)
        except TypeError as error:
            fix = "resume with the version of grape-ray that began the run"
            raise ConfigError(f"the {name} settings of the run cannot be rebuilt", str(error), "fields of this version", fix) from error
    return Config(task=rebuild_task(description["task"], trust), seed=description["seed"], **parts)


def describe(config: Config) -> dict[str, Any]:
    """What decides a run's result, as JSON values; `performance` is left out, because it must not."""
    parts = {name: dataclasses.asdict(getattr(config, name)) for name in ("privacy", "method")}
    return {"task": describe_task(config.task), **parts, "seed": config.seed}
