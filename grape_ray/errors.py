"""The errors that users meet: each says what, got, expected and fix, in one line, and survives
pickling between processes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GrapeRayError(Exception):
    """Base of every error raised on purpose.

    Args:
        what: what is wrong, as a short clause naming the field, file or layer.
        got: the offending value, as met.
        expected: what would have been accepted.
        fix: what the reader should do now.
    """

    def __init__(self, what: str, got: object = None, expected: str = "", fix: str = ""):
        super().__init__(what, got, expected, fix)
        self.what, self.got, self.expected, self.fix = what, got, expected, fix

    def __str__(self) -> str:
        parts = [self.what]
        if self.got is not None:
            parts.append(f"got {self.got!r}" if isinstance(self.got, str) else f"got {self.got}")
        if self.expected:
            parts.append(f"expected {self.expected}")
        return ", ".join(parts) + (f"; {self.fix}" if self.fix else "")

    def __reduce__(self):
        return type(self), (self.what, self.got, self.expected, self.fix)


class Caution(UserWarning):
    """A setting that is allowed and rarely meant; the program tells it in a line."""


class ConfigError(GrapeRayError):
    """A configuration value that cannot be used."""


class DataError(GrapeRayError):
    """A data file, column or record that cannot be used."""


class StorageError(GrapeRayError):
    """A storage location that cannot be read or written."""


class LedgerError(GrapeRayError):
    """A ledger that is damaged, belongs to something else, or cannot be reached."""


class BudgetExceeded(GrapeRayError):
    """A charge that the privacy budget does not cover."""


class NoiseReuse(GrapeRayError):
    """A second draw of a noise that was already drawn for another query."""


class UnsupportedLayer(GrapeRayError):
    """A trainable tensor whose per-example gradient cannot be computed."""


class CheckpointError(GrapeRayError):
    """A checkpoint that is missing, torn or does not fit the run."""


class TaskFailed(GrapeRayError):
    """An exception that is not this project's own, by its type and the lines it came through alone:
    its text may quote a record.
    """


class Interrupted(GrapeRayError):
    """A run that was asked to end, and ended gracefully."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``did you mean 'rank'?``, or the list of known names where nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known names: " + ", ".join(names)
