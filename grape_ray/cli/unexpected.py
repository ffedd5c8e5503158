"""An error that is no GrapeRayError, as one line on the terminal; the lines of code that it came
through are kept in a file of the user's own, without texts that may quote a record.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from grape_ray.errors import GrapeRayError
from grape_ray.privacy.redaction import may_be_quoted, where

_FRAMES = 60
_NAMED = 2  # frames that the one line names


class Unexpected(GrapeRayError):
    """An error of no class of this project, as the command line shows it.

    Attributes:
        status: exit status of the process: 1, a fault of grape-ray; 2, of the task.
    """

    status = 1


def in_one_line(error: Exception, command: str) -> Unexpected:
    """The one line for an error that is not this project's, once its traceback is kept.

    The text of an error may quote a record, so neither the line nor the file holds it, unless all
    records that the failing code had seen are public (`redaction.run_redacted`); then it is the
    task's own code that failed. The lines of code that it came through are kept in any case.

    Args:
        command: that was called, without its values.
    """
    frames, public = where(error, _FRAMES), may_be_quoted(error)
    what = (
        f"the task failed with {type(error).__name__}"
        if public
        else f"an unexpected {type(error).__name__}"
    )
    if public and str(error):
        what += f" ({' '.join(str(error).split())[:300]})"
    try:
        kept = f"its traceback is kept in {_keep(error, command)}"
    except OSError as failure:
        kept = f"its traceback could not be kept: {type(failure).__name__}"
    expected = (
        "a task that runs"
        if public
        else "errors that say what to do: this one is a fault of grape-ray"
    )
    fix = f"{kept}; `grape-ray --debug` shows it whole, with whatever it may quote"
    found = Unexpected(
        what, "at " + " < ".join(reversed(frames[-_NAMED:])) if frames else None, expected, fix
    )
    found.status = 2 if public else 1
    return found


def state_folder() -> Path:
    """Where tracebacks are kept: `$XDG_STATE_HOME/grape-ray`, or `~/.local/state/grape-ray`."""
    return (
        Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "grape-ray"
    ).absolute()


def _keep(error: Exception, command: str) -> Path:
    """Writes a file of its own that only the user may read, in a folder that only the user may
    list. Raises OSError.
    """
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = (
        folder / f"error-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.urandom(4).hex()}.txt"
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write("\n".join(_lines(error, command)) + "\n")
    return path


def _lines(error: Exception, command: str) -> Iterator[str]:
    """Versions, and for each error of the chain, the innermost first, its type and the lines it
    came through.
    """
    for name in ("grape-ray", "torch", "transformers", "ray", "pyarrow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield f"{name} {metadata.version(name)}"
    yield f"python {platform.python_version()}, {platform.system()}"
    yield f"command: {command}"
    for link in reversed(list(_chain(error))):
        yield ""
        yield f"{type(link).__module__}.{type(link).__qualname__}" + (
            f": {link}" if may_be_quoted(error) else ""
        )
        yield from (f"  {frame}" for frame in where(link, _FRAMES))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
