"""How a step scales: measured on one and two real ranks, and modelled for many GPUs from bytes and
published bandwidths.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from grape_ray.bench.models import Setting, build
from grape_ray.bench.paid import paid_steps
from grape_ray.config.schema import Method
from grape_ray.distributed.comms import Comms
from grape_ray.engines import make_engine
from grape_ray.optim import make_optimizer
from grape_ray.privacy.noise import NoiseStream, privatize

WARM_UP, STEPS = 1, 3
GPUS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Machine:
    """Published figures of a GPU and of what joins it to others.

    Attributes:
        flops: dense bf16 a second. utilisation: the part of it that training reaches. inside,
            between: bytes a second of a GPU within a machine of `per_node` GPUs and out of it.
            latency_s: of one hop of a ring.
    """

    name: str
    flops: float
    utilisation: float
    inside: float
    between: float
    per_node: int
    latency_s: float


H100 = Machine(
    "H100 SXM, NVLink 450 GB/s each way, InfiniBand NDR 50 GB/s a GPU",
    989e12,
    0.4,
    450e9,
    50e9,
    8,
    5e-6,
)
ETHERNET = Machine(
    "the same GPUs on 100 Gb/s Ethernet a machine of eight",
    989e12,
    0.4,
    450e9,
    12.5e9 / 8,
    8,
    30e-6,
)

# name -> (width, layers, feed-forward width, words, rank of the DP-GRAPE paper)
OPT = {
    "OPT-1.3B": (2048, 24, 8192, 50272, 16),
    "OPT-6.7B": (4096, 32, 16384, 50272, 64),
    "OPT-66B": (9216, 64, 36864, 50272, 64),
}


def sizes(name: str) -> tuple[int, int]:
    """(parameters, coordinates noised and reduced a step) of an OPT with projected inputs and
    vocabulary.
    """
    width, layers, wide, words, rank = OPT[name]
    matrices = layers * (4 * width * width + 2 * width * wide) + words * width
    small = layers * (9 * width + wide) + 2 * width
    positions = 2050 * width
    coordinates = layers * rank * (4 * width + wide + width) + rank * width + rank * width + small
    return matrices + small + positions, coordinates


def exchange_s(values: int, gpus: int, machine: Machine, width: int = 4) -> float:
    """Seconds of a ring reduce-scatter and all-gather of `values` numbers of `width` bytes, 2
    (n-1)/n of them over the slowest link.
    """
    link = machine.inside if gpus <= machine.per_node else machine.between
    return 2 * (gpus - 1) / gpus * values * width / link + 2 * (gpus - 1) * machine.latency_s


def compute_s(parameters: int, tokens: int, machine: Machine, passes: float) -> float:
    """Seconds of `passes` products with every weight (2 flops a weight, token and pass): 2 for
    DP-GRAPE, 3 for non-private training.
    """
    return 2 * passes * parameters * tokens / (machine.flops * machine.utilisation)


def table(name: str, machine: Machine, tokens: int) -> list[dict[str, float]]:
    """For each number of GPUs: seconds of a step's arithmetic, of exchanging coordinates and of
    exchanging whole gradients.
    """
    parameters, coordinates = sizes(name)
    work = compute_s(parameters, tokens, machine, 2)
    return [
        {
            "gpus": gpus,
            "compute_s": work,
            "coordinates_s": exchange_s(coordinates, gpus, machine),
            "gradients_s": exchange_s(parameters, gpus, machine),
        }
        for gpus in GPUS
    ]


def hidden_tokens(name: str, gpus: int, machine: Machine) -> float:
    """Tokens a GPU must work on in a step for the exchange of coordinates to take no longer than
    the backward half of it.
    """
    parameters, coordinates = sizes(name)
    return exchange_s(coordinates, gpus, machine) / (compute_s(parameters, 1, machine, 2) / 2)


def modelled(tokens: int = 2048) -> str:
    """The model's table, in Markdown: milliseconds a step, and the tokens a GPU needs for the
    exchange of coordinates to be hidden.
    """
    lines = [
        (
            "| model, rank | coordinates | network | GPUs | arithmetic ms | coordinates ms | whole"
            " gradients ms | tokens a GPU to hide it |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in OPT:
        parameters, coordinates = sizes(name)
        for machine in (H100, ETHERNET):
            for row in table(name, machine, tokens):
                if row["gpus"] in (8, 64, 512):
                    times = " | ".join(
                        f"{1e3 * row[k]:.3g}" for k in ("compute_s", "coordinates_s", "gradients_s")
                    )
                    share = f"{coordinates / 1e6:.0f} M of {parameters / 1e6:.0f} M"
                    hidden = hidden_tokens(name, int(row["gpus"]), machine)
                    network = "InfiniBand" if machine is H100 else "Ethernet"
                    lines.append(
                        f"| {name}, {OPT[name][4]} | {share} | {network} | {row['gpus']} | {times}"
                        f" | {hidden:,.0f} |"
                    )
    return "\n".join(lines) + "\n"


def weak(where: Setting, method: str, rank: int, ranks: int) -> Mapping[str, float]:
    """CPU-seconds and wall-clock seconds an example on real gloo ranks, each with a batch and a
    thread of its own.

    Raises:
        ConfigError: the method cannot train the model, as with a rank above a layer's side.
    """
    make_engine(build(where)[0], method, rank=rank)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_one_rank, args=(where, method, rank, ranks, folder), nprocs=ranks)  # pyright: ignore[reportPrivateImportUsage]
        found = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(ranks)]
    count = ranks * where.rows * STEPS
    return {
        "cpu_s": sum(f["cpu_s"] for f in found) / count,
        "wall_s": max(f["wall_s"] for f in found) / count,
    }


def _one_rank(index: int, where: Setting, method: str, rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=ranks
    )
    model, loss, batch = build(where)
    engine, comms = make_engine(model, method, rank=rank), Comms.distributed()
    optimizer = make_optimizer(model, engine, Method(name=method, rank=rank), 10**6)
    stream, grant = NoiseStream(bytes(32)), paid_steps(engine.estimated)

    def step(number: int) -> None:
        summed = engine.clipped_sum(loss, batch, step=number)
        size = ranks * where.rows
        optimizer.step(
            privatize(summed, stream, grant=grant, expected_batch_size=size, comms=comms)
        )

    for number in range(WARM_UP):
        step(number)
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    for number in range(WARM_UP, WARM_UP + STEPS):
        step(number)
    result = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    (Path(folder) / f"{index}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
