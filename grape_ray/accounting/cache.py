"""Calibrations remembered on disk: a search takes seconds, its proof a fraction of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

_FORMAT = 2  # to be raised whenever the accountant's answers change


def folder() -> Path:
    """Where answers lie: ``$XDG_CACHE_HOME/grape-ray/calibration``; it may be removed at any
    time.
    """
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "grape-ray"
        / "calibration"
    )


def recall(question: Mapping[str, object]) -> float | None:
    """The number that was remembered for a question, or None.

    It is a hint: the file could have been edited, so the caller proves it again before it is used.
    """
    # a damaged answer is no answer
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        answer = json.loads(_path(question).read_text())
        if answer["question"] == _full(question):
            return float(answer["answer"])
    return None


def remember(question: Mapping[str, object], answer: float) -> None:
    """Keeps an answer; a cache that cannot be written is done without."""
    path = _path(question)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # a reader sees a whole file, and two writers do not share one
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"question": _full(question), "answer": answer}))
        temporary.replace(path)


def _full(question: Mapping[str, object]) -> dict[str, object]:
    # the figures come out of scipy's functions
    return {**question, "format": _FORMAT, "scipy": version("scipy")}


def _path(question: Mapping[str, object]) -> Path:
    text = json.dumps(_full(question), sort_keys=True)
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
