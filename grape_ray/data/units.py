"""Which records belong to which privacy unit (a user, a patient, a document): two flat arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grape_ray.errors import DataError

_FIX = "make them with grape_ray.data.units.Units.of"


@dataclass(frozen=True)
class Units:
    """The records of each privacy unit. A unit may have none; it counts as a unit all the same.

    Two integers a record at most, in arrays that may be memory-mapped; there is no object a record
    or a unit.

    Attributes:
        offsets: (U + 1,) integers; the records of unit u are order[offsets[u]:offsets[u + 1]].
        order: (N,) integers: each record once, those of one unit after those of another.

    Raises:
        DataError: the arrays do not say of each record, once, whose it is.
    """

    offsets: np.ndarray
    order: np.ndarray

    def __post_init__(self) -> None:
        for name, array in (("offsets", self.offsets), ("order", self.order)):
            if array.ndim != 1 or array.dtype.kind not in "iu":
                got = f"{array.dtype} of shape {array.shape}"
                raise DataError(f"{name} of privacy units", got, "integers in one dimension", _FIX)
        offsets, count = self.offsets, len(self.order)
        if (
            not len(offsets)
            or offsets[0] != 0
            or offsets[-1] != count
            or np.any(offsets[1:] < offsets[:-1])
        ):
            expected = f"numbers that rise from 0 to the {count} records"
            raise DataError("offsets of privacy units", "others", expected, _FIX)
        seen = np.zeros(count, dtype=bool)
        if count and self.order.min() >= 0 and self.order.max() < count:
            seen[self.order] = True
        if not seen.all():
            raise DataError("order of privacy units", "another list", "each record once", _FIX)

    @classmethod
    def of(cls, codes: np.ndarray, count: int | None = None) -> Units:
        """The units of records that carry an integer code.

        Args:
            codes: (N,) integers in [0, U), the unit of each record. count: U; None is one above the
                largest code.

        Raises:
            DataError: other codes.

        >>> units = Units.of(np.array([2, 0, 2, 2]))
        >>> len(units), units.records_of(2).tolist(), units.records_of(1).tolist()
        (3, [0, 2, 3], [])
        """
        codes = np.asarray(codes)
        if codes.ndim != 1 or codes.dtype.kind not in "iu":
            got = f"{codes.dtype} of shape {codes.shape}"
            raise DataError("codes of privacy units", got, "one integer a record", _FIX)
        units = (int(codes.max()) + 1 if len(codes) else 0) if count is None else count
        if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < units:
            expected = f"integers from 0 to {max(units, 1) - 1}"
            raise DataError("codes of privacy units", "one out of range", expected, "number them")
        sizes = np.bincount(codes, minlength=units) if len(codes) else np.zeros(units, np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
        return cls(offsets, np.argsort(codes, kind="stable"))

    def __len__(self) -> int:
        """U, the number of units."""
        return len(self.offsets) - 1

    def records_of(self, unit: int) -> np.ndarray:
        """Indices of a unit's records."""
        return self.order[self.offsets[unit] : self.offsets[unit + 1]]

    def sizes(self, units: np.ndarray) -> np.ndarray:
        """How many records each of some units has, int64."""
        return (self.offsets[units + 1] - self.offsets[units]).astype(np.int64)

    def records_at(self, units: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Indices of single records, each named by its unit and its place among that one's."""
        return np.asarray(self.order[self.offsets[units] + places], dtype=np.int64)
