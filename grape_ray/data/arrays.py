"""Records held as flat arrays, in memory or mapped from a file, from which batches are cut and
padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 18  # records looked at together where all are, so that memory does not grow with N


@dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths in one array.

    Attributes:
        values: all sequences end to end; token ids are int32, bytes uint8. offsets: (N + 1,) int64;
            sequence i is values[offsets[i]:offsets[i + 1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(
        cls, sequences: Sequence[Sequence[int]] | Sequence[np.ndarray], dtype: type = np.int32
    ) -> Ragged:
        """The sequences, packed."""
        lengths = np.fromiter((len(s) for s in sequences), dtype=np.int64, count=len(sequences))
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        values = np.empty(int(offsets[-1]), dtype=dtype)
        for start, sequence in zip(offsets, sequences):
            values[start : start + len(sequence)] = sequence
        return cls(values, offsets)

    @classmethod
    def of_bytes(cls, strings: Iterable[bytes]) -> Ragged:
        """Byte strings, packed: encoded texts, or the content of image files."""
        return cls.of([np.frombuffer(string, dtype=np.uint8) for string in strings], np.uint8)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Sequence `index`, a view."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """The lengths of the sequences at `indices`."""
        return self.offsets[indices + 1] - self.offsets[indices]

    def take(self, indices: np.ndarray) -> Ragged:
        """The sequences at `indices`, copied."""
        return Ragged.of([self[i] for i in indices], self.values.dtype.type)

    def padded(self, indices: np.ndarray, fill: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """The sequences at `indices`, padded to the longest of them (rounded up to `multiple`).

        Returns:
            values (B, T) int64 and a mask (B, T) int64, 1 on real tokens.
        """
        starts, lengths = self.offsets[indices], self.lengths(indices)
        longest = -(-int(lengths.max(initial=1)) // multiple) * multiple
        columns = np.arange(longest)
        mask = columns[None, :] < lengths[:, None]
        positions = np.where(mask, starts[:, None] + columns[None, :], 0)
        values = np.where(mask, self.values[positions] if len(self.values) else 0, fill)
        return torch.from_numpy(values.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))


@dataclass(frozen=True)
class Digests:
    """What recognises records: computed once, where they are written.

    Attributes:
        whole: of all columns in order, 32 hexadecimal digits. columns: of each column that tells
            datasets apart. rows: (N,) uint64, of each record.
    """

    whole: str
    columns: tuple[str, ...]
    rows: np.ndarray


@dataclass(frozen=True)
class Records:
    """Columns of equal length; a fixed-size column is an array (N, ...), one of token sequences is
    Ragged.

    Attributes:
        digests: of these very columns, where they are known; None has them computed when asked for
            (`data.fingerprints`).
        starts: (S + 1,) the first record of each shard, where they lie in shards that not every
            node holds; None where every node holds them all.
    """

    columns: Mapping[str, np.ndarray | Ragged]
    digests: Digests | None = None
    starts: np.ndarray | None = None

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
        lengths = self._lengths(indices)
        return indices if lengths is None else indices[np.argsort(lengths, kind="stable")]

    def extremes(self) -> tuple[int, int]:
        """The indices of the shortest and of the longest record; of several, the first and the
        last.
        """
        first, last = (0, 0), (0, len(self) - 1)
        for start in range(0, len(self), _BLOCK):
            lengths = self._lengths(np.arange(start, min(start + _BLOCK, len(self))))
            if lengths is None:
                return 0, len(self) - 1
            low, high = int(lengths.argmin()), len(lengths) - 1 - int(lengths[::-1].argmax())
            if start == 0 or lengths[low] < first[0]:
                first = (int(lengths[low]), start + low)
            if start == 0 or lengths[high] >= last[0]:
                last = (int(lengths[high]), start + high)
        return first[1], last[1]

    def owners(self, indices: np.ndarray, world_size: int) -> np.ndarray:
        """For records in shards, the rank that holds each: a rank holds consecutive shards."""
        assert self.starts is not None
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        return shards * world_size // (len(self.starts) - 1)

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

    def _lengths(self, indices: np.ndarray) -> np.ndarray | None:
        """The total length of the records' sequences; None where no column holds sequences."""
        found = [
            column.lengths(indices)
            for column in self.columns.values()
            if isinstance(column, Ragged)
        ]
        return np.sum(found, axis=0) if found else None
