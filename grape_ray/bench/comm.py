"""Bytes that one step puts on the wire: two real gloo ranks take the noise line on one step's
coordinates.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from grape_ray.bench.models import Setting, build
from grape_ray.bench.paid import paid_steps
from grape_ray.distributed.comms import Comms
from grape_ray.engines import make_engine
from grape_ray.privacy.noise import NoiseStream, privatize

RANKS = 2


def bytes_per_step(where: Setting, method: str, rank: int) -> int:
    """Payload bytes that one of two ranks sends a step: its part of the reduction and of the
    gather.

    Raises:
        ConfigError: the method cannot train the model, as with a rank above a layer's side.
    """
    # refused here, with one line, rather than on two ranks
    make_engine(build(where)[0], method, rank=rank)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_one_rank, args=(where, method, rank, folder), nprocs=RANKS)  # pyright: ignore[reportPrivateImportUsage]
        return int((Path(folder) / "bytes").read_text())


def _one_rank(index: int, where: Setting, method: str, rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=RANKS
    )
    model, _, _ = build(where)
    engine, comms = make_engine(model, method, rank=rank), Comms.distributed()
    privatize(
        engine.empty_sum(),
        NoiseStream(bytes(32)),
        step=0,
        grant=paid_steps(),
        expected_batch_size=1,
        comms=comms,
    )
    if index == 0:
        (Path(folder) / "bytes").write_text(str(comms.bytes_sent))
    dist.barrier()  # a rank that leaves first may take the other's connection down
    dist.destroy_process_group()
