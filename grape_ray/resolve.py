"""From the name of a pipeline to its frozen Config, and from a saved description back to a task."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from grape_ray.config import Config, Method, Performance, Privacy
from grape_ray.errors import ConfigError, nearest


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


def load_module(name: str, reference: str, kind: str = "pipeline") -> ModuleType:
    """The module, from the path or the current folder. Raises ConfigError, which calls it by its kind, where it cannot be imported."""
    if os.getcwd() not in sys.path and "" not in sys.path:
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


def rebuild_task(description: Mapping[str, Any]) -> Any:
    """The task that `describe_task` described. Raises ConfigError where its class cannot be imported or has other fields."""
    reference = description["class"]
    module_name, _, qualified = reference.partition(":")
    found: Any = load_module(module_name, reference, "task")
    try:
        for part in qualified.split("."):
            found = getattr(found, part)
        return found(**description["fields"])
    except (AttributeError, TypeError) as error:
        fix = "call it where the run's own version can be imported"
        raise ConfigError("the task of the run cannot be rebuilt", reference, "a class with the saved fields", fix) from error


def rebuild_config(description: Mapping[str, Any]) -> Config:
    """The config that `describe` described. Raises ConfigError where this version knows other fields."""
    parts: dict[str, Any] = {}
    for name, kind in (("privacy", Privacy), ("method", Method), ("performance", Performance)):
        saved: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in description.get(name, {}).items()}
        try:
            parts[name] = kind(**saved)
        except TypeError as error:
            fix = "resume with the version of grape-ray that began the run"
            raise ConfigError(f"the {name} settings of the run cannot be rebuilt", str(error), "fields of this version", fix) from error
    return Config(task=rebuild_task(description["task"]), seed=description["seed"], **parts)


def describe(config: Config) -> dict[str, Any]:
    """What decides a run's result, as JSON values; `performance` is left out, because it must not."""
    parts = {name: dataclasses.asdict(getattr(config, name)) for name in ("privacy", "method")}
    return {"task": describe_task(config.task), **parts, "seed": config.seed}
