"""The part of a run's state that one rank writes and reads: its rows of what is sharded, its share
of what every rank holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grape_ray import checkpoint
from grape_ray.checkpoint import Reader, Shard
from grape_ray.distributed import sharding
from grape_ray.distributed.comms import Comms
from grape_ray.errors import CheckpointError
from grape_ray.optim import Optimizer


def shards_of(
    tensors: Mapping[str, Tensor], places: Mapping[str, tuple[tuple[int, ...], int]], comms: Comms
) -> dict[str, Shard]:
    """What this rank writes, so that all ranks together write each row once.

    Args:
        places: of tensors of which a rank holds some rows alone: (shape of the whole, first row).
            The others are the same everywhere.
    """
    common = {name: tensor for name, tensor in tensors.items() if name not in places}
    own = {
        name: Shard(tensors[name], *place)
        for name, place in places.items()
        if name in tensors and len(tensors[name])  # a rank beyond a short tensor's rows has none
    }
    return {**checkpoint.share(common, comms.rank, comms.world_size), **own}


def model_places(model: nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
    """Where this rank's rows of a sharded model's tensors lie; empty for a whole one."""
    if not sharding.is_sharded(model):
        return {}
    return {
        name: (tuple(p.shape), sharding.rows(p).start)
        for name, p in model.named_parameters()
        if isinstance(p, DTensor)
    }


def held(model: nn.Module) -> dict[str, Tensor]:
    """The model's distinct tensors as this rank holds them."""
    return {name: sharding.local(tensor) for name, tensor in checkpoint.distinct(model).items()}


def restore_rows(reader: Reader, model: nn.Module, optimizer: Optimizer) -> None:
    """Reads a full checkpoint into a sharded model and its optimizer; each rank reads only the rows
    that it holds.

    Raises:
        CheckpointError: names or shapes differ, or a file is damaged.
    """
    if reader.manifest.base:
        raise CheckpointError(
            f"checkpoint {reader.manifest.name} is a delta",
            None,
            "a full one",
            "resume without performance.sharded",
        )
    places, mine = model_places(model), held(model)
    wrong = sorted(set(mine) ^ set(reader.names("model")))
    if wrong:
        raise CheckpointError(
            "the checkpoint holds another model",
            ", ".join(wrong[:3]),
            "the run's own model",
            "resume with its own task",
        )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(_rows(reader, "model", name, places, tensor))
    # The optimizer's own state says which tensors there are and of which rows; values are read.
    state, own = optimizer.state_dict(), optimizer.places()
    saved = {
        name: _rows(reader, "optimizer", name, own, t)
        for name, t in state.items()
        if isinstance(t, Tensor)
    }
    optimizer.load_state_dict({**saved, **reader.manifest.counters["optimizer"]})


def _rows(
    reader: Reader,
    kind: str,
    name: str,
    places: Mapping[str, tuple[tuple[int, ...], int]],
    like: Tensor,
) -> Tensor:
    """What the checkpoint holds for this rank's part of a tensor."""
    if name not in places:
        return reader.read(kind, name)
    return (
        reader.read(kind, name, places[name][1], len(like))
        if len(like)
        else torch.empty_like(like, device="cpu")
    )
