"""From the name of a pipeline to its frozen Config."""

from __future__ import annotations

from collections.abc import Callable

from grape_ray.config.modules import call, load_module, located
from grape_ray.config.run_file import ENDINGS, read_run_file
from grape_ray.config.schema import Config
from grape_ray.errors import ConfigError, nearest

_RETURNS = "a function that returns a grape_ray.Config"
TASK_METHODS = ("load", "build_model", "collate", "per_example_loss", "evaluate", "save")


def pipeline(reference: str) -> Config:
    """The Config of a pipeline.

    Args:
        reference: a run file, `run.yaml`; or `module:function`; or a module whose function of the
            same last name (`pipelines.sst2` -> `sst2`), or else `config`, is meant; looked up in
            the current folder, too. A module may be given by its file, `folder/name.py`.

    Raises:
        ConfigError: no such module or function, or it returns something else.
    """
    if reference.endswith(ENDINGS):
        return _checked(read_run_file(reference), reference)
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


def _called(function: Callable[[], object], reference: str) -> Config:
    """What a pipeline's function returns, if it is a Config."""
    return _checked(call(function, f"pipeline {reference}", _RETURNS), reference)


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
