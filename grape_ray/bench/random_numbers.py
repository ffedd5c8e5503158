"""How fast random numbers are made: noise, projections, the bits that round weights."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from grape_ray.bench.clock import clock
from grape_ray.privacy.random_streams import normals, public_bits, public_normals
from grape_ray.storage import Json

_WIDTH = 1024
_KEY = bytes(32)
_KINDS: dict[str, Callable[[int, torch.device], Tensor]] = {
    "secret normals, float64": lambda count, device: normals(_KEY, 0, 0, count, device),
    "public normals, float32": lambda count, device: public_normals(
        _KEY, "w", 0, (count // _WIDTH, _WIDTH), device=device
    ),
    "public bits, 16": lambda count, device: public_bits(
        _KEY, "w", 0, (count // _WIDTH, _WIDTH), device=device
    ),
}


def rates(device: str, count: int, rounds: int) -> list[Json]:
    """Of each kind of number: `kind`, `threads`, `per_s` (numbers a second of wall time) and
    `cost_ns` (nanoseconds of the benchmarks' clock a number), the median of interleaved rounds of
    `count` numbers; on a CPU by one thread and by as many as torch has.
    """
    most, place = torch.get_num_threads(), torch.device(device)
    cases = [
        (kind, threads)
        for kind in _KINDS
        for threads in sorted({1, most} if device == "cpu" else {1})
    ]
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
    now = clock(device)
    try:
        for _ in range(rounds + 1):  # the first warms up
            for kind, threads in cases:
                torch.set_num_threads(threads)
                begun, wall = now(), time.perf_counter()
                _KINDS[kind](count, place)
                cost = now() - begun
                taken[kind, threads].append((time.perf_counter() - wall, cost))
    finally:
        torch.set_num_threads(most)
    rows: list[Json] = []
    for (kind, threads), times in taken.items():
        wall, cost = (sorted(values)[len(values) // 2] for values in zip(*times[1:]))
        rows.append(
            {"kind": kind, "threads": threads, "per_s": count / wall, "cost_ns": cost / count * 1e9}
        )
    return rows
