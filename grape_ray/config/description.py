"""The description of a run (`run.json`): written, read back and checked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from grape_ray.accounting.mechanism import RECORD
from grape_ray.config.modules import load_module, located
from grape_ray.config.pipelines import TASK_METHODS
from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.config.trust import check_function, check_module, names
from grape_ray.errors import CheckpointError, ConfigError
from grape_ray.ledger.location import RUN_FILE
from grape_ray.storage import Json, Storage

_Kind = TypeVar("_Kind")
_RUN = {  # fields of a run's description, and their types
    "run": (str,), "ledger": (str, type(None)), "study": (str,), "seed": (int,), "task": (dict,),
    "privacy": (dict,), "method": (dict,), "performance": (dict,),
}  # fmt: skip
_LATER = ("performance",)  # a field that early descriptions lack
# Tasks of this package that moved: where descriptions of older runs and sweeps say that they live,
# and where they live.
_OLD_HOMES = {
    "grape_ray.models.text_classification": "grape_ray.tasks.text_classification",
    "grape_ray.models.text_generation": "grape_ray.tasks.text_generation",
}


def read_run(folder: Storage) -> Json:
    """The description of a run. Raises CheckpointError where the folder holds none."""
    try:
        return _parsed(folder.read(RUN_FILE))
    except FileNotFoundError as error:
        fix = "name the folder below --storage"
        raise CheckpointError(
            "no run there", folder.url, f"a run's folder, with {RUN_FILE}", fix
        ) from error
    except (ValueError, RecursionError) as error:  # nested a thousand deep, JSON is no JSON
        expected = "the JSON that its beginning wrote"
        raise CheckpointError(
            f"{RUN_FILE} of the run is damaged", str(error), expected, "restore it from a copy"
        ) from error


def _parsed(data: bytes) -> Json:
    """The description of a run, as its file holds it, with what every description has.

    Raises:
        ValueError: why it is none.
    """
    known = json.loads(data)
    if not isinstance(known, dict):
        raise ValueError(f"a {type(known).__name__}, not an object")
    for name, kinds in _RUN.items():
        if name not in known and name not in _LATER:
            raise ValueError(f"no {name}")
        if name in known and not isinstance(known[name], kinds):
            raise ValueError(f"{name} is a {type(known[name]).__name__}")
    if not isinstance(known["task"].get("class"), str) or not isinstance(
        known["task"].get("fields"), dict
    ):
        raise ValueError("a task without its class and fields")
    return {"unit": RECORD, **known, "task": at_home(known["task"])}


def up_to_date(description: Json, config: Config) -> Json:
    """The description of a config as this version would write it, with the names and fields that
    are known today; as it is where it describes another task than that of `config`.
    """
    trust = named_modules(config.task)
    with contextlib.suppress(ConfigError):
        again = rebuild_config({**description, "task": at_home(description["task"])}, trust)
        return {**description, **json.loads(json.dumps(describe(again)))}
    return description


def at_home(task: Json) -> Json:
    """The description of a task, its class where that lives now."""
    module, separator, name = task["class"].partition(":")
    return {**task, "class": f"{_OLD_HOMES.get(module, module)}{separator}{name}"}


def describe_task(task: Any) -> Json:
    """A task as JSON values: where its class lives, and its fields."""
    kind = type(task)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": dataclasses.asdict(task)}


def named_modules(task: Any) -> tuple[str, ...]:
    """The modules that a task's description names: that of its class, and those of the functions
    that its fields name, where its class says so by `imported(fields)`.
    """
    return (type(task).__module__, *_imported(type(task), dataclasses.asdict(task)))


def _imported(kind: Any, fields: Json) -> list[str]:
    imported = getattr(kind, "imported", None)
    return [] if imported is None else imported(fields)


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
        value = getattr(task, field.name)
        try:
            json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError):
            raise _not_kept(field.name, getattr(task, field.name)) from None
    again = rebuild_config(json.loads(json.dumps(describe(config))), named_modules(task))
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
    (`trust.check_module`) is imported at all. Modules of functions that its fields name
    (`imported`) must have been named, too: they are called.

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
    fields = current_names(kind, fields) if isinstance(fields, dict) else fields
    if not isinstance(fields, dict) or not set(fields) <= known:
        raise ConfigError(
            "the task of the run cannot be rebuilt", reference, "a class with the saved fields", fix
        )
    for module in _imported(kind, fields):
        check_function(module, trust)
        load_module(module, module, "function")
    try:
        return _rebuilt(kind, fields)
    except TypeError as error:
        raise ConfigError(
            "the task of the run cannot be rebuilt", reference, "a class with the saved fields", fix
        ) from error


def _rebuilt(kind: type[_Kind], fields: Json) -> _Kind:
    """A dataclass from its JSON: lists become tuples, and objects groups of fields, where its
    annotations say so. Raises TypeError for other fields.
    """
    hints = typing.get_type_hints(kind)
    kept: Json = {}
    for name, value in fields.items():
        hint: Any = hints.get(name)
        if isinstance(value, list) and typing.get_origin(hint) is tuple:
            value = tuple(value)
        elif isinstance(value, dict) and dataclasses.is_dataclass(hint):
            value = _rebuilt(hint, value)  # pyright: ignore[reportArgumentType]
        kept[name] = value
    return kind(**kept)


def current_names(kind: Any, fields: Json) -> Json:
    """The fields of a task by the names that they have now: a class may say, in an attribute
    `renamed`, what it called them before.
    """
    renamed = getattr(kind, "renamed", {})
    return {renamed.get(name, name): value for name, value in fields.items()}


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
    if not config.privacy.unit:  # nor does what has no meaning decide anything
        parts["privacy"]["examples_per_unit"] = Privacy.examples_per_unit
    return {"task": describe_task(config.task), **parts, "seed": config.seed}
