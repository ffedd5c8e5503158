"""Errors of the task's own code, redacted: a text may quote a record, and errors end up in journals
and consoles.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import PurePath
from types import TracebackType
from typing import TypeVar

from grape_ray.errors import GrapeRayError, TaskFailed

_FRAMES, _SAID = 8, 3  # innermost lines that are kept, and those that a message names
_PUBLIC = "_grape_ray_saw_public_records_alone"  # a mark on errors
_Result = TypeVar("_Result")


def run_redacted(call: Callable[[], _Result], public: bool) -> _Result:
    """The result of `call`, which runs code of the task.

    Args:
        public: whether all records that it sees are public; then errors are raised as they are.

    Raises:
        GrapeRayError: of this project, as it is but for what caused it; TaskFailed for any other
            exception, with its type and the lines that it came through, and without its text, its
            values and the exceptions behind it.
    """
    try:
        return call()
    except BaseException as error:
        if public:
            setattr(error, _PUBLIC, True)
        if public or _harmless(error):
            raise
        failure = redacted(error)
    raise failure  # not in the handler, where Python would hang the original on it


def redacted(error: BaseException) -> Exception:
    """The error as it may be written down anywhere."""
    if isinstance(error, Exception) and is_ours(error):
        # what caused it may be an exception of the task's, whose text is kept with it
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    frames = where(error)
    fix = (
        "its text is kept back, because it may quote a record; on data that its task calls public"
        " it is shown"
    )
    # places in code, no values: they tell where to look, and nothing of a record
    calls = " < ".join(reversed(frames[-_SAID:]))
    return TaskFailed(
        f"the task failed with {type(error).__name__}",
        f"at {calls}" if calls else None,
        "a task that runs",
        fix,
    )


def where(error: BaseException, frames: int = _FRAMES) -> list[str]:
    """The last lines that an exception came through, as `folder/file.py:12 in function`, the
    innermost last; no source and no values.
    """
    found = traceback.extract_tb(error.__traceback__, limit=-frames)
    return [f"{'/'.join(PurePath(f.filename).parts[-2:])}:{f.lineno} in {f.name}" for f in found]


def may_be_quoted(error: BaseException) -> bool:
    """Whether the text of an error may be shown: it came out of `run_redacted`, and all records
    that the code in there had seen are public.
    """
    return getattr(error, _PUBLIC, False) is True


def text_of(error: BaseException) -> str:
    """What may be said of an error in one line: its text if it is ours, its type otherwise."""
    return str(error) if _is_own_class(error) else type(error).__name__


def is_ours(error: BaseException) -> bool:
    """Whether an exception has a class of this project and was raised by its code: the task's code
    may raise our classes, too.
    """
    return _is_own_class(error) and _raised_by(error.__traceback__).partition(".")[0] in (
        "grape_ray",
        "",
    )


def _is_own_class(error: BaseException) -> bool:
    return (
        isinstance(error, GrapeRayError) and type(error).__module__.partition(".")[0] == "grape_ray"
    )


def _raised_by(place: TracebackType | None) -> str:
    """The module whose code raised it; empty where that is not known, as of an error that came from
    another process.
    """
    name: object = ""
    while place is not None:
        name, place = place.tb_frame.f_globals.get("__name__", "?"), place.tb_next
    return str(name)


def _harmless(error: BaseException) -> bool:
    """Whether it is no failure at all, but an end that was asked for."""
    return isinstance(error, (KeyboardInterrupt, GeneratorExit)) or (
        isinstance(error, SystemExit) and not isinstance(error.code, str)
    )
