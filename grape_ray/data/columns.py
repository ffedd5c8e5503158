"""Columns of a table by what they hold: texts, labels, numbers, lists. What cannot be used is one
error with the numbers of its rows, counted from 0, and never their contents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grape_ray.errors import DataError

_NAMED_ROWS = 5
_MOST_CLASSES = 100_000
_FIX = "correct them, or set task.drop_bad_rows=true to leave such rows out"


class Table:
    """A table and where it came from, whose columns are asked for by what they should hold.

    Args:
        rows: the table. place: for errors. row_numbers: where they came from; None counts
            from 0.
    """

    def __init__(self, rows: pa.Table, place: str, row_numbers: range | np.ndarray | None = None):
        self.rows, self.place = rows, place
        self.row_numbers = range(rows.num_rows) if row_numbers is None else row_numbers

    def __len__(self) -> int:
        return self.rows.num_rows

    def slice(self, start: int, count: int) -> Table:
        """Some rows, without a copy."""
        end = start + count
        return Table(self.rows.slice(start, count), self.place, self.row_numbers[start:end])

    def check_texts(self, columns: Sequence[str]) -> None:
        """Refuses columns of another type than texts. Raises DataError."""
        for column in columns:
            self._check_type(column, is_text, "strings", "name the column of texts")

    def texts(self, column: str) -> list[str]:
        """A column of texts. Raises DataError for another type, or bytes that are no text."""
        self.check_texts([column])
        try:
            return self.rows[column].to_pylist()
        except UnicodeDecodeError:  # its text quotes the record
            failure = self._refused(
                column, "bytes that are no text", "strings in UTF-8", "convert it"
            )
        raise failure

    def numbers(self, column: str) -> np.ndarray:
        """A column of numbers, float32 (N,). Raises DataError for another type."""
        self._check_type(column, is_number, "numbers", "name a column of numbers")
        return self.rows[column].cast(pa.float32()).to_numpy()

    def lists(self, column: str, items: Callable[[pa.DataType], bool], of: str) -> list[list]:
        """A column of lists whose members' type is accepted by `items`. Raises DataError."""

        def fits(kind: pa.DataType) -> bool:
            return is_list(kind) and (items(kind.value_type) or pa.types.is_null(kind.value_type))

        self._check_type(column, fits, f"lists of {of}", "name another column")
        return self.rows[column].to_pylist()

    def binary(self, column: str) -> list[bytes]:
        """A column of byte strings. Raises DataError for another type."""
        self._check_type(column, is_binary, "bytes", "name the column of encoded images")
        return self.rows[column].to_pylist()

    def labels(self, column: str, names: Sequence[str]) -> np.ndarray:
        """A column of labels as the places of their names, int64 (N,); integers are the places
        themselves where no name is a number.

        Raises:
            DataError: a label that has no name.
        """
        if self.holds_integers(column) and not any(name.lstrip("-").isdigit() for name in names):
            names = [str(place) for place in range(len(names))]
        found = pc.call_function(
            "index_in",
            [self._label_texts(column)],
            options=pc.SetLookupOptions(pa.array(names, pa.string())),
        )
        unknown = np.flatnonzero(pc.call_function("is_null", [found]).to_numpy())
        if len(unknown):
            got, fix = self._rows(unknown), "name all labels in task.labels, or correct the rows"
            raise self._refused(column, f"another label in {got}", _one_of(names), fix)
        return found.to_numpy().astype(np.int64)

    def label_names(self, column: str) -> tuple[str, ...]:
        """The different labels of a column, as texts: numbers in their order, others in that of the
        alphabet.

        Raises:
            DataError: another type than texts, integers and booleans, or too many labels.
        """
        texts = pc.call_function("unique", [self._label_texts(column)])
        if len(texts) > min(_MOST_CLASSES, max(20, len(self) // 2)):
            got, fix = f"{len(texts)} different values in {len(self)} rows", "name another column"
            raise self._refused(column, got, "labels, each of several rows", fix)
        found = [str(name) for name in texts.to_pylist()]
        return tuple(sorted(found, key=int if self.holds_integers(column) else None))

    def holds_integers(self, column: str) -> bool:
        """Whether a column is of integers."""
        return pa.types.is_integer(self.rows.schema.field(column).type)

    def without(self, bad: np.ndarray) -> Table:
        """The table without the rows where `bad` (N,) is true."""
        if not bad.any():
            return self
        return Table(self.rows.filter(pa.array(~bad)), self.place, np.array(self.row_numbers)[~bad])

    def bad_rows(
        self, columns: Sequence[str], filled: Sequence[str], labels: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        """The rows (N,) bool that cannot be used, by the reason.

        Args:
            columns: those that must hold a value in each row. filled: those of texts or lists that
                must not be empty. labels: those of labels, in which -1 stands for none, as in
                datasets on the hub.
        """
        found = {}
        for column in columns:
            missing = pc.call_function("is_null", [self.rows[column]]).to_numpy()
            if missing.any():
                found[f"{int(missing.sum())} missing values of column '{column}'"] = missing
        for column in filled:
            empty = _empty(self.rows[column])
            if empty.any():
                found[f"{int(empty.sum())} empty values of column '{column}'"] = empty
        signed = (c for c in labels if pa.types.is_signed_integer(self.rows.schema.field(c).type))
        for column in signed:
            none = pc.call_function("equal", [self.rows[column], pa.scalar(-1)])
            unlabelled = pc.call_function("coalesce", [none, pa.scalar(False)]).to_numpy()
            if unlabelled.any():
                found[f"{int(unlabelled.sum())} labels -1 (none) of column '{column}'"] = unlabelled
        return found

    def refuse(self, bad: dict[str, np.ndarray]) -> None:
        """One error for all rows that cannot be used. Raises DataError."""
        if bad:
            reasons = [f"{why} in {self._rows(np.flatnonzero(rows))}" for why, rows in bad.items()]
            expected = "a value in every row"
            raise DataError(f"rows of {self.place}", "; ".join(reasons), expected, _FIX)

    def refuse_rows(self, what: str, rows: np.ndarray, expected: str, fix: str) -> None:
        """Refuses rows by their numbers in this table. Raises DataError, if there are any."""
        if len(rows):
            raise DataError(f"rows of {self.place}", f"{what} in {self._rows(rows)}", expected, fix)

    def _label_texts(self, column: str) -> pa.ChunkedArray:
        kind = self.rows.schema.field(column).type
        self._check_type(
            column, _is_label, "labels: strings, integers or booleans", _label_fix(kind)
        )
        return self.rows[column].cast(pa.string())

    def _check_type(
        self, column: str, fits: Callable[[pa.DataType], bool], expected: str, fix: str
    ) -> None:
        kind = self.rows.schema.field(column).type
        if not fits(kind):
            raise self._refused(column, type_name(kind), expected, fix)

    def _refused(self, column: str, got: str, expected: str, fix: str) -> DataError:
        return DataError(f"column '{column}' of {self.place}", got, expected, fix)

    def _rows(self, rows: np.ndarray) -> str:
        """The numbers of some rows, in words."""
        first = ", ".join(str(self.row_numbers[int(row)]) for row in rows[:_NAMED_ROWS])
        more = len(rows) - _NAMED_ROWS
        return f"row{'s' if len(rows) > 1 else ''} {first}" + (f" and {more} more" * (more > 0))


def type_name(kind: pa.DataType) -> str:
    """A type in words, without the names of a structure's fields: of a JSON object with a key for
    each person they are a record's content.
    """
    return re.sub(r"struct<.*>", "struct", str(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is that of texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_number(kind: pa.DataType) -> bool:
    """Whether a type is that of numbers."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is that of lists of any length."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Whether a type is that of byte strings."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_label(kind: pa.DataType) -> bool:
    return is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _label_fix(kind: pa.DataType) -> str:
    whole = "store whole numbers as integers, or learn numbers with task regression"
    return whole if pa.types.is_floating(kind) else "name the column of labels"


def _empty(column: pa.ChunkedArray) -> np.ndarray:
    """Which rows (N,) hold an empty list, or no more than white space."""
    if is_list(column.type):
        lengths = pc.call_function("list_value_length", [column])
    elif is_text(column.type):
        trimmed = pc.call_function("ascii_trim_whitespace", [column])
        lengths = pc.call_function("binary_length", [trimmed])
    else:
        return np.zeros(len(column), dtype=bool)
    return pc.call_function("equal", [lengths, 0]).to_numpy().astype(object) == True  # noqa: E712


def _one_of(names: Sequence[str]) -> str:
    """Some of the names, which are public: they go into the model's configuration."""
    if list(names) == [str(place) for place in range(len(names))]:
        return f"0 to {len(names) - 1}"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return "one of " + ", ".join(names[:8]) + more
