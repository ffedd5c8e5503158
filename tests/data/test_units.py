"""Which records belong to which privacy unit."""

import numpy as np
import pytest

from grape_ray.data.units import Units
from grape_ray.errors import DataError

CODES = np.array([3, 0, 3, 5, 0, 3])


def test_units_hold_each_record_once_and_some_hold_none():
    units = Units.of(CODES)
    assert len(units) == 6
    assert [units.records_of(u).tolist() for u in range(6)] == [[1, 4], [], [], [0, 2, 5], [], [3]]
    assert units.sizes(np.array([3, 1])).tolist() == [3, 0]
    assert units.records_at(np.array([3, 0, 3]), np.array([2, 0, 0])).tolist() == [5, 1, 0]
    assert len(Units.of(CODES, count=9)) == 9
    assert (len(Units.of(CODES[:0])), len(Units.of(CODES[:0], count=2))) == (0, 2)
    assert len(Units.of(CODES.astype(np.uint8))) == 6


def test_units_may_lie_in_files(tmp_path):
    units = Units.of(np.random.default_rng(0).integers(0, 300, 1000))
    for name, array in (("offsets", units.offsets), ("order", units.order)):
        np.save(tmp_path / name, array.astype(np.int32))
    mapped = Units(*(np.load(tmp_path / f"{n}.npy", mmap_mode="r") for n in ("offsets", "order")))
    assert isinstance(mapped.order, np.memmap)
    some = np.array([0, 299, 7])
    assert (mapped.sizes(some) == units.sizes(some)).all()
    assert (mapped.records_at(some, np.zeros(3, int)) == units.order[units.offsets[some]]).all()


@pytest.mark.parametrize(
    ("codes", "count"),
    [([-1, 0], None), ([0, 2], 2), ([0.0, 1.0], None), ([[0, 1]], None), (["anna", "bob"], None)],
)
def test_other_codes_are_refused_and_not_quoted(codes, count):
    with pytest.raises(DataError, match="codes of privacy units") as raised:
        Units.of(np.array(codes), count)
    assert "anna" not in str(raised.value)


@pytest.mark.parametrize(
    ("offsets", "order"),
    [([0, 2], [0, 0]), ([0, 2], [0, 2]), ([0, 1], [0, 1]), ([1, 2], [0, 1]), ([0, 2, 1, 2], [0, 1]),
     ([], []), ([0, 2], [-1, 0])],
)  # fmt: skip
def test_a_record_of_two_units_or_of_none_is_refused(offsets, order):
    with pytest.raises(DataError, match="of privacy units"):
        Units(np.array(offsets, dtype=np.int64), np.array(order, dtype=np.int64))
