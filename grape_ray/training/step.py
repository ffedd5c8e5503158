"""One training step: this rank's share of the Poisson batch, clipped sums, the noise line, the
update.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from grape_ray.data.arrays import Records
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
from grape_ray.tasks.task import Task, to_device

_AHEAD = 1 << 25  # normals drawn ahead at most, 256 MiB


@dataclass(frozen=True)
class Step:
    """The function (model state, key, step) -> model state; every rank calls it for every step.

    Guarantees: each record is in the batch with probability `sampling_prob`, independently,
    whatever the number of ranks; the noise is drawn once; an empty batch or an empty share is a
    step like any other.

    Attributes:
        loss: per-example loss, the task's own or one in lower precision.
        noise: this attempt's secret stream; None for the non-private baseline.
        expected_batch_size: the divisor.
        sampling_key: 32 bytes, secret and of this attempt (of the public seed for the baseline).
        dropout_key: as sampling_key: an example's place in its batch, and so its mask, depends on
            the others.
        micro_batch_size: examples a pass; changes rounding at most.
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
        batch = poisson_batch(self.sampling_key, step, len(self.records), self.sampling_prob)
        # the batch is the same on every rank, so no rank needs to send another its share
        share = batch[self.comms.rank :: self.comms.world_size]
        largest = -(-len(batch) // self.comms.world_size) if is_sharded(self.model) else len(share)
        self._draw_ahead(step)
        summed = self._summed(share, largest, step)
        self.optimizer.step(self._gradient(summed, len(batch), grant))

    def _draw_ahead(self, step: int) -> None:
        """Where a GPU computes the gradients, idle cores draw the noise meanwhile: it does not
        depend on them.
        """
        if self.noise is None or self.device.type != "cuda":
            return
        low, high = self.comms.slice_of(self.engine.coordinates)
        if high - low <= _AHEAD:
            self.noise.draw_ahead(step, low, high - low)

    def _summed(self, share: np.ndarray, largest: int, step: int) -> ClippedSum:
        """The clipped sum over this rank's share, by micro-batches.

        The ranks of a sharded model gather its weights together, so each runs as many micro-batches
        as the `largest` share needs, of equal sizes; what is missing is made up by rows that are
        masked out.
        """
        total, share = None, self.records.by_length(share)
        for start in range(0, largest, self.micro_batch_size):
            # What a model draws, dropout's masks above all, is a function of (key, step), of the
            # rank and of the place in its share.
            place = 2 * (self.comms.rank * len(self.records) + start)
            torch.manual_seed(int(words(self.dropout_key, step, place, 1)[0] >> np.uint64(1)))
            own = share[start : start + self.micro_batch_size]
            size = min(self.micro_batch_size, largest - start)
            # the first record, again and again; the mask leaves it out of the sum
            filler = np.zeros(size - len(own), dtype=own.dtype)
            mask = torch.arange(size, device=self.device) < len(own) if len(filler) else None
            batch = to_device(
                self.task.collate(self.records, np.concatenate([own, filler])), self.device
            )
            part = self.engine.clipped_sum(self.loss, batch, step=step, mask=mask)
            total = part if total is None else total + part
        return self.engine.empty_sum(step) if total is None else total

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
