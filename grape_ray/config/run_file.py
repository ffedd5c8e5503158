"""A run as a YAML file: all that a pipeline says, without code."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import yaml

from grape_ray.config.kinds import KINDS, task_class
from grape_ray.config.overrides import assign, parse
from grape_ray.config.schema import Config
from grape_ray.errors import ConfigError, nearest
from grape_ray.storage import Json

ENDINGS = (".yaml", ".yml")
_PLACES = ("data", "validation", "model", "tokenizer")  # fields that may name something on a disk
_EXPECTED = "task, privacy, method, performance, seed"


def begun_with(path: str) -> tuple[str, list[str]]:
    """The pipeline that a file begins with (`pipeline: pipelines.vit_cifar10`), and all else that
    it says, as `key=value` texts: parameters of that pipeline, such as `size: small`, and fields.
    An empty name where the file says a whole run itself.

    Raises:
        ConfigError: no such file, no YAML, or a pipeline that is itself a file of this kind.
    """
    said = _parsed(path)
    base = said.pop("pipeline", "")
    if not base:
        return "", []
    if not isinstance(base, str) or base.endswith(ENDINGS):
        expected = "a module, module:function, or FILE.py"
        raise ConfigError(f"{path}: pipeline", None, expected, "name a pipeline in Python")
    if isinstance(said.get("task"), dict):
        said["task"] = _beside(said["task"], Path(path).absolute().parent)
    leaves = (leaf for key, value in said.items() for leaf in _flat(key, value))
    return base, [f"{key}={_text(value)}" for key, value in leaves]


def read_run_file(path: str) -> Config:
    """The Config that a YAML file describes.

    It has the groups of a Config: `task` with a `kind` (a name of `config.kinds.KINDS`, or
    `module:Class`) and the task's fields, `privacy`, `method`, `performance`, and `seed`. What a
    file leaves out has its default. Paths that exist beside the file are meant so. A `module:Class`
    is imported, as a pipeline is: read a file of another's before you train it. A file that begins
    with a pipeline in Python is read by `begun_with`.

    Raises:
        ConfigError: no such file, no YAML, or what `--set` would refuse, in the file's name.
    """
    said = _parsed(path)
    task: Any = said.pop("task", None)
    if not isinstance(task, dict) or not isinstance(task.get("kind"), str):
        fix = f"write `task:` with `kind: {next(iter(KINDS))}` below it"
        raise ConfigError(f"{path}: task.kind", None, "one of " + ", ".join(KINDS), fix)
    fields = _beside({k: v for k, v in task.items() if k != "kind"}, Path(path).absolute().parent)
    config = Config(task=_task(task_class(task["kind"]), fields, path))
    for key, value in [*_flat("task", fields), *(p for k, v in said.items() for p in _flat(k, v))]:
        config = assign(config, key.split("."), _text(value), key, f"{path}:")
    return config


def _parsed(path: str) -> Json:
    try:
        # All texts, which fields parse by their types: YAML's own reading makes 128 of 2:8, and
        # false of a label `no`.
        found = yaml.load(Path(path).expanduser().read_text(), yaml.BaseLoader)
    except FileNotFoundError:
        near = [str(p) for end in ENDINGS for p in Path(path).absolute().parent.glob(f"*{end}")]
        fix = nearest(path, [os.path.relpath(p) for p in near[:20]])
        raise ConfigError("pipeline not found", path, "a YAML file", fix) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} cannot be read", None, "a YAML file", reason) from error
    if not isinstance(found, dict):
        raise ConfigError(path, None, f"a mapping with {_EXPECTED}", "see `init`")
    return found


def _task(kind: type, fields: Json, path: str) -> Any:
    """A task with the fields that have no default; the others are assigned later."""
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.init and field.default is field.default_factory is dataclasses.MISSING
    ]
    for name in needed:
        if name not in fields:
            fix = f"write `{name}:` below `task:`"
            raise ConfigError(f"{path}: task.{name}", None, "a value", fix)
    return kind(
        **{name: parse(_text(fields[name]), kind, name, f"{path}: task") for name in needed}
    )


def _flat(key: str, value: object) -> list[tuple[str, object]]:
    """The leaves below a key, each with its whole name."""
    if not isinstance(value, dict):
        return [(key, value)]
    return [leaf for name, below in value.items() for leaf in _flat(f"{key}.{name}", below)]


def _text(value: object) -> str:
    """A value as `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _beside(fields: Json, folder: Path) -> Json:
    """The fields, with the whole path of what lies beside the file and not in this folder."""

    def place(value: object) -> object:
        if not isinstance(value, str) or not value or Path(value).expanduser().exists():
            return value
        return str(folder / value) if (folder / value).exists() else value

    return {name: place(value) if name in _PLACES else value for name, value in fields.items()}
