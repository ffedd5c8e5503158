"""One training step: this rank's share of the Poisson batch of units, clipped sums, the noise line,
the update.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from grape_ray.data.arrays import Records
from grape_ray.data.units import Units
from grape_ray.distributed.comms import Comms
from grape_ray.distributed.sharding import is_sharded
from grape_ray.engines import Engine
from grape_ray.engines.engine import PerExampleLoss
from grape_ray.errors import LedgerError
from grape_ray.ledger.grant import Grant
from grape_ray.optim import Optimizer
from grape_ray.privacy.noise import NoiseStream, nonprivate_mean, privatize
from grape_ray.privacy.random_streams import poisson_batch, words
from grape_ray.privacy.types import ClippedSum, NonPrivateGradient, PrivateGradient
from grape_ray.tasks.task import Task, to_device, views_of
from grape_ray.training.micro_batches import MicroBatch, common_sizes, micro_batches, share_of


@dataclass(frozen=True)
class Step:
    """The function (model state, key, step) -> model state; every rank calls it for every step.

    Guarantees: each unit is in the batch with probability `sampling_prob`, independently, whatever
    the number of ranks, and so are the records that are picked of it; the noise is drawn once; an
    empty batch or an empty share is a step like any other.

    Attributes:
        loss: per-example loss, the task's own or one in lower precision.
        units: whose the records are; None where each is a unit of its own. examples_per_unit:
            records that are taken of a sampled unit, at most.
        noise: this attempt's secret stream; None for the non-private baseline.
        expected_batch_size: the divisor, in units.
        sampling_key: 32 bytes, secret and of this attempt (of the public seed for the baseline).
        dropout_key: as sampling_key: an example's place in its batch, and so its mask, depends on
            the others.
        micro_batch_size: rows a pass, or those of one unit; changes rounding at most.
    """

    task: Task
    loss: PerExampleLoss
    model: nn.Module
    engine: Engine
    optimizer: Optimizer
    records: Records
    comms: Comms
    device: torch.device
    noise: NoiseStream | None
    sampling_prob: float
    expected_batch_size: int
    sampling_key: bytes
    dropout_key: bytes
    micro_batch_size: int
    units: Units | None = None
    examples_per_unit: int = 1

    def __call__(self, step: int, grant: Grant | None = None) -> None:
        """Takes step `step` (0-based).

        Args:
            grant: what the step is paid for with; None for the non-private baseline alone.

        Raises:
            LedgerError: the grant does not cover the step, or pays for less.
            NoiseReuse: this attempt has drawn the step's noise before.
        """
        if grant is not None and grant.mechanism.sampling_prob < self.sampling_prob:
            raise LedgerError(
                "the sampling of a step",
                f"probability {self.sampling_prob:g}",
                f"at most {grant.mechanism.sampling_prob:g}, which it is paid for with",
                "charge the study of this run's mechanism",
            )
        batch = poisson_batch(self.sampling_key, step, self._size(), self.sampling_prob)
        summed = self._summed(batch, step)
        self.optimizer.step(self._gradient(summed, len(batch), grant))

    def _size(self) -> int:
        """The number of units that are sampled from."""
        return len(self.records if self.units is None else self.units)

    def _summed(self, batch: np.ndarray, step: int) -> ClippedSum:
        """The clipped sum over this rank's share, by micro-batches."""
        total, place = None, self.comms.rank * self._size()
        for part in self._micro_batches(batch, step):
            # What a model draws, dropout's masks above all, is a function of (key, step), of the
            # rank and of the place in its share.
            seed = words(self.dropout_key, step, place + part.place, 1)[0] >> np.uint64(1)
            torch.manual_seed(int(seed))
            rows = to_device(self.task.collate(self.records, part.records), self.device)
            mask = None if part.mask is None else part.mask.to(self.device)
            summed = self.engine.clipped_sum(
                self.loss, rows, step=step, mask=mask, groups=part.groups, units=part.units
            )
            total = summed if total is None else total + summed
        return self.engine.empty_sum(step) if total is None else total

    def _micro_batches(self, batch: np.ndarray, step: int) -> Iterator[MicroBatch]:
        """Those of this rank's share of the batch: every world_size-th unit, or those that lie in
        its shards.

        The ranks of a sharded model gather its weights together, so each runs as many micro-batches
        as the rank with the most, of equal sizes; what is missing is made up by fillers.
        """
        mine, by_record = self._mine(batch), self.units is None
        share = share_of(
            mine, self.records, self.units, self.sampling_key, step, self.examples_per_unit
        )
        size, views, sizes = self.micro_batch_size, views_of(self.task), None
        if is_sharded(self.model):
            known = len(batch) if by_record and self.records.starts is None else None
            sizes = common_sizes(share, size, views, self.comms, known)
        return micro_batches(share, size, views, not by_record or views > 1, sizes)

    def _mine(self, batch: np.ndarray) -> np.ndarray:
        """The units of a batch that this rank takes."""
        rank, world_size = self.comms.rank, self.comms.world_size
        if self.records.starts is None:
            return batch[rank::world_size]
        if self.units is None:
            return batch[self.records.owners(batch, world_size) == rank]
        kept = batch[self.units.sizes(batch) > 0]  # a unit's records lie in one shard
        firsts = self.units.records_at(kept, np.zeros(len(kept), dtype=np.int64))
        return kept[self.records.owners(firsts, world_size) == rank]

    def _gradient(
        self, summed: ClippedSum, batch_size: int, grant: Grant | None
    ) -> PrivateGradient | NonPrivateGradient:
        if self.noise is None:
            return nonprivate_mean(summed, batch_size=batch_size, comms=self.comms)
        return privatize(
            summed,
            self.noise,
            grant=grant,  # pyright: ignore[reportArgumentType]  (None is refused there)
            expected_batch_size=self.expected_batch_size,
            comms=self.comms,
        )
