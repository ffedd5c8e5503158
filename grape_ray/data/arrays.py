"""Records held as flat arrays in memory, from which batches are cut and padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths in one array.

    Attributes:
        values: all sequences end to end, int32. offsets: (N + 1,) int64; sequence i is
            values[offsets[i]:offsets[i + 1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]] | Sequence[np.ndarray]) -> Ragged:
        """The sequences, packed."""
        lengths = np.fromiter((len(s) for s in sequences), dtype=np.int64, count=len(sequences))
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        values = np.empty(int(offsets[-1]), dtype=np.int32)
        for start, sequence in zip(offsets, sequences):
            values[start : start + len(sequence)] = sequence
        return cls(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, indices: np.ndarray) -> Ragged:
        """The sequences at `indices`, copied."""
        return Ragged.of([self.values[self.offsets[i] : self.offsets[i + 1]] for i in indices])

    def padded(self, indices: np.ndarray, fill: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """The sequences at `indices`, padded to the longest of them (rounded up to `multiple`).

        Returns:
            values (B, T) int64 and a mask (B, T) int64, 1 on real tokens.
        """
        starts, lengths = self.offsets[indices], np.diff(self.offsets)[indices]
        longest = -(-int(lengths.max(initial=1)) // multiple) * multiple
        columns = np.arange(longest)
        mask = columns[None, :] < lengths[:, None]
        positions = np.where(mask, starts[:, None] + columns[None, :], 0)
        values = np.where(mask, self.values[positions] if len(self.values) else 0, fill)
        return torch.from_numpy(values.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))


@dataclass(frozen=True)
class Records:
    """Columns of equal length; a fixed-size column is an array (N, ...), one of token sequences is
    Ragged.
    """

    columns: Mapping[str, np.ndarray | Ragged]

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns of different lengths: {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def by_length(self, indices: np.ndarray) -> np.ndarray:
        """The same indices, those of short sequences first, so that batches cut from them need
        little padding.
        """
        lengths = [
            np.diff(column.offsets)[indices]
            for column in self.columns.values()
            if isinstance(column, Ragged)
        ]
        return indices[np.argsort(sum(lengths), kind="stable")] if lengths else indices

    def take(self, indices: np.ndarray) -> Records:
        """The records at `indices`, copied, in that order."""
        return Records(
            {
                name: column.take(indices) if isinstance(column, Ragged) else column[indices]
                for name, column in self.columns.items()
            }
        )

    def array(self, name: str) -> np.ndarray:
        """A fixed-size column."""
        column = self.columns[name]
        assert isinstance(column, np.ndarray), name
        return column

    def sequences(self, name: str) -> Ragged:
        """A column of token sequences."""
        column = self.columns[name]
        assert isinstance(column, Ragged), name
        return column
