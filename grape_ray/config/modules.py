"""Modules of the user's own, by name or by the path of their file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from grape_ray.errors import ConfigError, GrapeRayError, nearest
from grape_ray.privacy.redaction import where

_Result = TypeVar("_Result")
_NOT_OWN = ("grape_ray", "abc", "typing")  # packages whose code is none of the user's
_PROCESS = secrets.token_hex(16)
_EXAMPLES, _ROOT = ("pipelines", "tune_spaces"), Path(__file__).parents[2]
_MOST_NAMED = 20  # files beside one that is missing
_FILES: dict[str, str] = {}  # modules that were named by their file, and are not found without it


def load_module(name: str, reference: str, kind: str = "pipeline", here: bool = True) -> ModuleType:
    """The module, from the path or, if `here`, from the current folder before that.

    Raises:
        ConfigError: it cannot be imported; the error calls it by its kind.
    """
    if here and os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return _imported(name)
    except GrapeRayError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            what = f"{kind} {reference} needs a module"
            # No advice to install it: of a name with a slip, anyone may have made a package.
            fix = "correct the name, or install the package that you know to hold it"
            raise ConfigError(what, error.name, "an installed module", fix) from error
        raise ConfigError(
            f"{kind} not found",
            reference,
            "an importable module",
            nearest(name, _neighbours(name, kind)),
        ) from error
    except Exception as error:  # its code may raise anything; no record has been read by now
        reason = f"{type(error).__name__}: {error}, at {(where(error) or ['?'])[-1]}"
        raise ConfigError(
            f"{kind} cannot be imported", reference, "an importable module", reason
        ) from error


def _imported(name: str) -> ModuleType:
    """The module; one of this project's examples also where a package of the user's own has the
    name of theirs (`pipelines`), and hides it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package, _, rest = name.partition(".")
        ours = _ROOT / package
        hidden = package in _EXAMPLES and error.name == name and (ours / f"{rest}.py").is_file()
        if not hidden or str(ours) in sys.modules[package].__path__:
            raise
    sys.modules[package].__path__.append(str(ours))
    _tell_processes(str(_ROOT))
    return importlib.import_module(name)


def call(function: Callable[[], _Result], what: str, expected: str) -> _Result:
    """What a function of such a module returns. Raises ConfigError where it fails."""
    try:
        return function()
    except GrapeRayError:
        raise
    except Exception as error:  # no record has been read by now
        raise ConfigError(
            f"{what} failed",
            f"{type(error).__name__}: {error}",
            expected,
            f"see {where(error)[-1]}",
        ) from error


def code_of(kind: type) -> str:
    """What changes when the modules change that a task's own classes lie in; empty for tasks of
    this package. What those modules import is not looked at.
    """
    modules = dict.fromkeys(base.__module__ for base in kind.__mro__[:-1])
    own = [name for name in modules if name.partition(".")[0] not in _NOT_OWN]
    if not own:
        return ""
    try:
        sources = [inspect.getsource(sys.modules[name]) for name in own]
    except (KeyError, OSError, TypeError):  # typed in: nothing says whether it was changed
        return _PROCESS
    return hashlib.sha256("|".join(sources).encode()).hexdigest()[:32]


def is_file(reference: str) -> bool:
    """Whether a module is given by its file's path, not by its name."""
    return reference.endswith(".py") or "/" in reference or os.sep in reference


def located(reference: str, kind: str = "pipeline") -> str:
    """The name of a module; one that is given by its file can be imported by that name from now on,
    here and in processes begun here.

    Raises:
        ConfigError: there is no such file, or its name is that of another module.
    """
    if not is_file(reference):
        return reference
    path = _file(reference, kind)
    name, folder = _place(path)
    added = [] if str(folder) in sys.path else [str(folder)]
    sys.path[:0] = added
    try:
        loaded = sys.modules.get(name)
        spec = None if loaded else importlib.util.find_spec(name)
        found = getattr(loaded, "__file__", None) if loaded else spec and spec.origin
    except Exception as error:  # of the packages that it lies in
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{kind} cannot be imported", reference, "an importable module", reason
        ) from error
    if not found or os.path.realpath(found) != os.path.realpath(path):
        if added:
            sys.path.remove(str(folder))
        got, fix = f"{name}, which is {found or 'built in'}", "give the file another name"
        raise ConfigError(
            f"{kind} {reference} has the name of another module", got, "a name of its own", fix
        )
    if str(folder) != os.getcwd():  # which every process of a run looks into
        _FILES[name] = str(path)
        _tell_processes(str(folder))
    return name


def file_of(module: str) -> str | None:
    """The path by which a module was named, where its name alone does not find it."""
    return _FILES.get(module)


def _file(reference: str, kind: str) -> Path:
    for path in (Path(reference).expanduser(), Path(f"{reference}.py").expanduser()):
        if path.is_file() and path.suffix == ".py":
            return path.absolute()
    beside = [
        str(path)
        for path in Path(reference).expanduser().parent.glob("*.py")
        if path.stem != "__init__"
    ]
    fix = (
        nearest(reference, beside)
        if 0 < len(beside) <= _MOST_NAMED
        else "check the path, or name a module such as pipelines.digits_vit"
    )
    raise ConfigError(
        f"{kind} not found", reference, "a module, or the path of its file, which ends in .py", fix
    )


def _place(path: Path) -> tuple[str, Path]:
    """The module that a file is, with the packages it lies in, and the folder from which that name
    finds it.
    """
    parts, folder = [path.stem], path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts), folder


def _tell_processes(folder: str) -> None:
    """Puts a folder on the path of processes that this one begins, such as a local cluster's."""
    known = os.environ.get("PYTHONPATH", "")
    if folder not in known.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [known])])


def _neighbours(name: str, kind: str) -> list[str]:
    """Modules beside the one that is missing; where a bare name is missing, those beside the kind's
    own examples.
    """
    example = "tune_spaces.digits" if kind == "tune space" else "pipelines.digits_vit"
    package = (name.rpartition(".")[0] or example).split(".")[0]
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    places = list(spec.submodule_search_locations or []) if spec else []
    places += [str(_ROOT / package)] if package in _EXAMPLES else []
    return [f"{package}.{m.name}" for m in pkgutil.iter_modules(places)] or [example]
