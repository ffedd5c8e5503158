"""Collectives between ranks: reduce a flat sum by slices, gather the released slices, share small
objects; nothing is sent at world size 1.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

# Renamed in torch 2.13, where the old names warn.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


_Value = TypeVar("_Value")


class Comms:
    """The ranks of one attempt.

    Attributes:
        rank, world_size: this process's place.
        bytes_sent: payload bytes this rank has put on the wire in reductions and gathers, by the
            ring algorithm's count.
    """

    def __init__(self, rank: int = 0, world_size: int = 1):
        self.rank, self.world_size, self.bytes_sent = rank, world_size, 0

    @classmethod
    def local(cls) -> Comms:
        """One process alone."""
        return cls()

    @classmethod
    def distributed(cls) -> Comms:
        """The default torch.distributed group, which must be initialised."""
        return cls(dist.get_rank(), dist.get_world_size())

    def slice_of(self, length: int) -> tuple[int, int]:
        """The half-open slice of a flat vector that this rank owns; the last ranks' may be shorter
        or empty.
        """
        share = -(-length // self.world_size)
        return min(self.rank * share, length), min((self.rank + 1) * share, length)

    def reduce_slice(self, flat: Tensor) -> Tensor:
        """Sum of `flat` (n,) over ranks, this rank's slice alone (at most ceil(n / world_size)
        elements).
        """
        low, high = self.slice_of(flat.numel())
        if self.world_size == 1:
            return flat
        share = -(-flat.numel() // self.world_size)
        # the collectives want equal shares
        padded = torch.nn.functional.pad(flat, (0, share * self.world_size - flat.numel()))
        mine = torch.empty(share, dtype=flat.dtype, device=flat.device)
        _reduce_scatter(mine, padded)
        self.bytes_sent += share * (self.world_size - 1) * flat.element_size()
        return mine[: high - low]

    def gather_slices(self, mine: Tensor, length: int) -> Tensor:
        """The whole flat vector (length,) from every rank's slice."""
        if self.world_size == 1:
            return mine
        share = -(-length // self.world_size)
        padded = torch.nn.functional.pad(mine, (0, share - mine.numel()))
        whole = torch.empty(share * self.world_size, dtype=mine.dtype, device=mine.device)
        _all_gather(whole, padded)
        self.bytes_sent += share * (self.world_size - 1) * mine.element_size()
        return whole[:length]

    def broadcast_object(self, value: _Value | None) -> _Value:
        """Rank 0's `value`, on every rank; what the others give does not count."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return cast(_Value, box[0])

    def gather_objects(self, value: _Value) -> list[_Value]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        boxes: list[_Value | None] = [None] * self.world_size
        dist.all_gather_object(boxes, value)
        return cast(list[_Value], boxes)

    def largest(self, value: int) -> int:
        """The largest `value` of all ranks, on every rank."""
        if self.world_size == 1:
            return value
        # NCCL reaches device memory alone
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        box = torch.tensor([value], dtype=torch.int32, device=device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box)

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world_size > 1:
            dist.barrier()
