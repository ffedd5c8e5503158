"""The micro-batches of a step: this rank's share of the sampled units, their records, and which
rows are whose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from grape_ray.data.arrays import Records
from grape_ray.data.units import Units
from grape_ray.distributed.comms import Comms
from grape_ray.privacy.random_streams import picks_within_units


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass sees; a unit is never split between two.

    Attributes:
        records: indices, of fillers too. place: of its first unit in the rank's share.
        groups: (rows,) the unit of each row, with `views` rows a record; None where each row is a
            unit of its own.
        units: their number. mask: (units,) False for fillers; None where there are none.
    """

    records: np.ndarray
    place: int
    groups: Tensor | None
    units: int
    mask: Tensor | None


@dataclass(frozen=True)
class Share:
    """A rank's share of a step's batch: whole units, those of short records first.

    Attributes:
        records: (R,) indices, one unit's after the other's. counts: (L,) how many each unit has, at
            least one.
    """

    records: np.ndarray
    counts: np.ndarray


def share_of(
    chosen: np.ndarray,
    records: Records,
    units: Units | None,
    key: bytes,
    step: int,
    examples_per_unit: int,
) -> Share:
    """The records that a step takes of some sampled units.

    Args:
        chosen: indices of units; of records where `units` is None. key: the sampling key.
    """
    if units is None:
        return Share(records.by_length(chosen), np.ones(len(chosen), dtype=np.int64))
    places, counts = picks_within_units(key, step, chosen, units.sizes(chosen), examples_per_unit)
    picked = units.records_at(np.repeat(chosen, counts), places)
    counts = counts[counts > 0]  # a unit without records contributes nothing
    order, starts = _by_longest(picked, counts, records), np.cumsum(counts) - counts
    within = np.arange(len(picked)) - np.repeat(
        np.cumsum(counts[order]) - counts[order], counts[order]
    )
    return Share(picked[np.repeat(starts[order], counts[order]) + within], counts[order])


def _by_longest(picked: np.ndarray, counts: np.ndarray, records: Records) -> np.ndarray:
    """The order of units by the longest record of each, to which the others of its micro-batch are
    padded.
    """
    rank = np.empty(len(picked), dtype=np.int64)  # of each record among all, by its length
    by_index = np.argsort(picked)
    sorted_places = by_index[np.searchsorted(picked, records.by_length(picked), sorter=by_index)]
    rank[sorted_places] = np.arange(len(picked))
    starts = np.cumsum(counts) - counts
    return np.argsort(np.maximum.reduceat(rank, starts) if len(counts) else starts, kind="stable")


def micro_batches(
    share: Share, size: int, views: int, grouped: bool, padded_to: list[int] | None
) -> Iterator[MicroBatch]:
    """The share in micro-batches of whole units.

    Args:
        size: rows of one, at most, unless a single unit has more. views: rows a record.
        grouped: whether rows are units' in any other way than one each.
        padded_to: numbers of records of each micro-batch, made up by fillers that are masked out,
            so that every rank runs as many of the same sizes; None leaves fillers out.
    """
    cuts = cut(share.counts, max(1, size // views))
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(share.counts)])
    for number in range(len(cuts) - 1 if padded_to is None else len(padded_to)):
        first, last = cuts[min(number, len(cuts) - 1)], cuts[min(number + 1, len(cuts) - 1)]
        own = share.records[ends[first] : ends[last]]
        fillers = 0 if padded_to is None else padded_to[number] - len(own)
        units, counts = last - first + fillers, share.counts[first:last]
        groups = None
        if grouped:
            counts = np.concatenate([counts, np.ones(fillers, dtype=np.int64)])
            groups = torch.from_numpy(np.repeat(np.arange(units), counts * views))
        yield MicroBatch(
            np.concatenate([own, np.zeros(fillers, dtype=own.dtype)]),
            first,
            groups,
            units,
            torch.arange(units) < last - first if fillers else None,
        )


def cut(counts: np.ndarray, size: int) -> list[int]:
    """Where micro-batches of at most `size` records, or of one unit, begin and end, from 0 to the
    number of units.

    >>> cut(np.array([1, 2, 2, 9, 1]), 5)
    [0, 3, 4, 5]
    """
    ends, cuts = np.cumsum(counts), [0]
    while cuts[-1] < len(counts):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        fits = int(np.searchsorted(ends, before + size, side="right"))
        cuts.append(max(fits, cuts[-1] + 1))
    return cuts


def common_sizes(
    share: Share, size: int, views: int, comms: Comms, records: int | None
) -> list[int]:
    """Numbers of records of the micro-batches that every rank runs, where ranks must run a model
    together; every rank calls it.

    Args:
        size, views: see `micro_batches`. records: of the whole batch, where each is a unit; the
            answer is known then without asking the other ranks.
    """
    size = max(1, size // views)
    if records is not None:
        largest = -(-records // comms.world_size)
        return [min(size, largest - start) for start in range(0, largest, size)]
    cuts = cut(share.counts, size)
    rows = [int(share.counts[first:last].sum()) for first, last in pairwise(cuts)]
    return [comms.largest(max(rows, default=0))] * comms.largest(len(rows))
