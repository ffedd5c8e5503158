"""What may be imported or unpickled because a folder says so: only what the user, or a program of
the user's, has named.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from grape_ray.config.modules import file_of
from grape_ray.errors import ConfigError
from grape_ray.ledger.location import canonical, home
from grape_ray.storage import Storage

OWN = ("grape_ray", "pipelines", "tune_spaces")
_SWEEPS = "sweeps"
_ROOT = Path(__file__).resolve().parents[2]  # where this project's packages lie


def check_module(name: str, trusted: Iterable[str], kind: str) -> None:
    """Refuses, before it is imported, a module that a stored description names and nobody else
    does: importing runs its code.

    Trusted are this project's own modules, those that the running program has imported already, and
    `trusted` with all below them.

    Raises:
        ConfigError: which module to name, and how.
    """
    if is_own(name) or names(trusted, name) or name in sys.modules:
        return
    raise _untrusted(kind, name)


def check_function(module: str, trusted: Iterable[str]) -> None:
    """Refuses a module of functions that a stored description would have called, unless it is
    named: that a library is imported already does not make its functions harmless.

    Raises:
        ConfigError: which module to name, and how.
    """
    if not names(trusted, module):
        raise _untrusted("function", module)


def names(trusted: Iterable[str], module: str) -> bool:
    """Whether a module is among those that were named, or below one of them."""
    return any(module == known or module.startswith(f"{known}.") for known in trusted)


def is_own(module: str) -> bool:
    """Whether a module is this project's own: of one of its packages, and from where this one lies,
    not of a folder that has its name.
    """
    top = module.partition(".")[0]
    if top not in OWN or not all(part.isidentifier() for part in module.split(".")):
        return False
    try:
        spec = importlib.util.find_spec(top)  # of a top-level package: nothing is imported
    except (ImportError, ValueError):
        return False
    return (
        spec is not None
        and spec.origin is not None
        and Path(spec.origin).resolve().parents[1] == _ROOT
    )


def words_for(modules: Iterable[str]) -> str:
    """The options that `resume` and `export` need beside the run's folder, so that the modules that
    its task names may be imported; empty for our own.
    """
    others = dict.fromkeys(name for name in modules if not is_own(name))
    return "".join(f" --trust-module {shlex.quote(file_of(name) or name)}" for name in others)


def _untrusted(kind: str, name: str) -> ConfigError:
    fix = f"if you trust its code, say so: --trust-module {name} (in Python: trust=[{name!r}])"
    return ConfigError(
        f"the stored description names a {kind}'s module that you have not named",
        name,
        "a module that you trust",
        fix,
    )


def remember_sweep(url: str, mark: str) -> None:
    """Notes, in the user's own folder, that a sweep was begun there by this user. `mark` is a
    random text of the sweep's description.
    """
    Storage(home() / _SWEEPS).write(_name(url), mark.encode(), private=True)


def check_sweep(url: str, mark: str, trusted: bool) -> None:
    """Refuses to restore a sweep that this user did not begin there.

    Ray Tune keeps its state as pickles, and loading those runs code; the description says which
    folder of secrets is removed at the end.

    Args:
        trusted: whether the user has said that the state may be loaded all the same.

    Raises:
        ConfigError: the sweep is not known, and was not confirmed.
    """
    if trusted:
        return
    try:
        known = Storage(home() / _SWEEPS).read(_name(url)).decode()
    except FileNotFoundError:
        known = ""
    if not mark or known != mark:
        what = (
            "the sweep was not begun from here, and restoring its state runs whatever code it holds"
        )
        raise ConfigError(
            what,
            url,
            "a sweep of your own",
            "if you trust who can write there, say so: --trust-state (trust_state=True)",
        )


def _name(url: str) -> str:
    return hashlib.sha256(canonical(url).encode()).hexdigest()[:32]
