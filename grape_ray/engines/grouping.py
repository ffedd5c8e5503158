"""Several rows of a batch that count as one example: the records of a privacy unit, the augmented
views of an image, the two answers of a preference pair.

A unit's loss is the mean of its rows' losses, so its gradient is the average of theirs, and its
rows' positions are positions of one example: the factors (B,T,d) of B rows become (U,k*T,d) of U
units of up to k rows, and every method goes on as ever. Coordinates, which are small, are summed
instead where units have different numbers of rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grape_ray.engines.algebra.factor_pairs import Index, Left
from grape_ray.engines.collector import Collector, Materialised, sum_dtype
from grape_ray.errors import ConfigError


class Groups:
    """Which rows of a batch are one unit's.

    Attributes:
        units: U. rows: B. largest: k, the most rows of a unit. shares: (B,) float64, of each row in
            its unit's mean.
        in_place: whether all units have as many rows, one unit's after the other's, so that nothing
            has to be moved.

    Args:
        of: (B,) int64, the unit of each row. units: U; units without rows contribute zero.
        rows: B. device: of the batch.

    Raises:
        ConfigError: not one unit in [0, U) a row.
    """

    def __init__(self, of: Tensor, units: int | None, rows: int, device: torch.device):
        of = of.cpu()
        if (
            units is None
            or of.dtype != torch.int64
            or of.shape != (rows,)
            or not (rows == 0 or 0 <= int(of.min()) <= int(of.max()) < units)
        ):
            got = f"{of.dtype} of shape {tuple(of.shape)}, with units={units}"
            expected = f"int64 of shape ({rows},), the unit of each row, below units"
            raise ConfigError("groups", got, expected, "number the units of a batch from 0")
        self.units, self.rows, counts = units, rows, torch.bincount(of, minlength=units)
        self.largest = int(counts.max()) if rows else 0
        # row table[u, j] is the j-th of unit u, where present[u, j]
        order, starts = of.argsort(stable=True), counts.cumsum(0) - counts
        slots = torch.arange(self.largest)
        present = slots < counts.unsqueeze(1)
        table = order[torch.where(present, starts.unsqueeze(1) + slots, 0)]
        self.in_place = torch.equal(table.flatten(), torch.arange(rows))
        self._table, self._absent = table.to(device), (~present).to(device)
        self._of = of.to(device)
        self.shares = (1 / counts.double())[of].to(device)

    def joined(self, factor: Tensor) -> Tensor:
        """(B,T,...) -> (U,k*T,...): the positions of a unit's rows, zeros where it has fewer."""
        size = self.largest * factor.shape[1]
        if self.in_place:
            return factor.reshape(self.units, size, *factor.shape[2:])
        absent = self._absent.view(self.units, self.largest, *[1] * (factor.ndim - 1))
        wide = factor[self._table].masked_fill_(absent, 0)
        return wide.reshape(self.units, size, *factor.shape[2:])

    def summed(self, grads: Tensor) -> Tensor:
        """(B,...) -> (U,...), the sum over each unit's rows, always in the same order: ghost
        clipping's two passes must agree to the last bit.
        """
        if self.in_place:
            return grads.reshape(self.units, self.largest, *grads.shape[1:]).sum(1)
        total = grads.new_zeros(self.units, *grads.shape[1:])
        if grads.device.type == "cpu":  # adds one row after the other
            return total.index_add_(0, self._of, grads)
        return total.index_put_((self._of,), grads, accumulate=True)  # which sorts the rows


class Grouped(Collector):
    """Takes the gradients of rows, and hands those of units to a method's collector.

    Args:
        kept: the collector of U examples. groups: which rows are whose.
    """

    def __init__(self, kept: Collector, groups: Groups):
        super().__init__(kept.params, kept.examples, kept.subspace, kept.period)
        self._kept, self._groups = kept, groups

    @property
    def kept(self) -> Collector:
        return self._kept

    def announce(self, name: str) -> None:
        self._kept.announce(name)

    def pair(self, name: str, left: Left, right: Tensor) -> None:
        self._kept.pair(name, self._joined(left), self._groups.joined(right))

    def dense(self, name: str, grads: Tensor) -> None:
        self._kept.dense(name, self._groups.summed(grads.to(sum_dtype(self.params[name]))))

    def affine(self, name: str, bias: str, left: Tensor, right: Tensor) -> None:
        self._kept.affine(name, bias, self._groups.joined(left), self._groups.joined(right))

    def squared_norms(self) -> dict[str, Tensor]:
        return self._kept.squared_norms()

    def weighted_sum(self, factors: Mapping[str, Tensor], bad: Tensor) -> dict[str, Tensor]:
        return self._kept.weighted_sum(factors, bad)

    def _joined(self, left: Left) -> Left:
        if isinstance(left, Index):
            return Index(self._groups.joined(left.ids), left.size)
        return self._groups.joined(left)


class GroupedCoordinates(Grouped):
    """Of weights that are kept in coordinates, contracts row by row and sums over each unit's rows:
    cheaper than rows of zeros for the units that have fewer.
    """

    _kept: Materialised

    def pair(self, name: str, left: Left, right: Tensor) -> None:
        if name not in self.subspace.plan:
            super().pair(name, left, right)
            return
        rows = self._of_rows()
        rows.pair(name, left, right)
        self._add(rows)

    def affine(self, name: str, bias: str, left: Tensor, right: Tensor) -> None:
        if name not in self.subspace.plan:
            super().affine(name, bias, left, right)
            return
        rows = self._of_rows()
        rows.affine(name, bias, left, right)
        self._add(rows)

    def _of_rows(self) -> Materialised:
        return Materialised(self.params, self._groups.rows, self.subspace, self.period)

    def _add(self, rows: Materialised) -> None:
        for name, grads in rows.stored.items():
            self._kept.add(name, self._groups.summed(grads))


def grouped(kept: Collector, groups: Groups) -> Grouped:
    """The collector of rows that suits a method's collector of units."""
    if isinstance(kept, Materialised) and not groups.in_place:
        return GroupedCoordinates(kept, groups)
    return Grouped(kept, groups)
