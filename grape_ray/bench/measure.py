"""Interleaved rounds: every candidate takes a few steps in turn while the others sleep, so that a
drift of the machine meets all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grape_ray.bench.candidates import label
from grape_ray.bench.models import Setting
from grape_ray.bench.processes import Process

WARM_UP_STEPS = 2
MEMORY_STEPS = 3
Say = Callable[[str], None]
Named = Sequence[tuple[str, int | None]]  # (method, rank)


@dataclass(frozen=True)
class Row:
    """One candidate's figures; those that could not be measured are None and `error` says why.

    Attributes:
        method, rank: the candidate. seconds: median over rounds of a step's CPU-seconds (GPU:
            seconds).
        time_ratio: median over rounds of seconds / those of `none` in the same round.
        peak_bytes: above the loaded model. memory_ratio: over those of `none`.
    """

    method: str
    rank: int | None
    seconds: float | None
    time_ratio: float | None
    peak_bytes: int | None
    memory_ratio: float | None
    error: str = ""

    def to_json(self) -> dict[str, object]:
        """The row of a results file; `error` only where there is one."""
        return {name: value for name, value in vars(self).items() if name != "error" or value}


def measure(
    where: Setting, named: Named, rounds: int, steps: int, say: Say = lambda text: None
) -> list[Row]:
    """Times and peaks of the candidates, in separate processes and passes; `none` must be the
    first.
    """
    peaks = [_peak(where, method, rank, say) for method, rank in named]
    times = _times(where, named, rounds, steps, say)
    rows = []
    for (method, rank), (peak, no_peak), (seconds, no_seconds) in zip(named, peaks, times):
        ratios = [mine / base for mine, base in zip(seconds, times[0][0])]
        rows.append(
            Row(
                method, rank,
                statistics.median(seconds) if seconds else None,
                statistics.median(ratios) if ratios else None,
                peak,
                peak / peaks[0][0] if peak is not None and peaks[0][0] else None,
                no_seconds or no_peak,
            )
        )  # fmt: skip
    return rows


def _peak(where: Setting, method: str, rank: int | None, say: Say) -> tuple[int | None, str]:
    """(peak bytes, error) from a fresh process."""
    say(f"memory of {label(method, rank)}")
    with Process(where, method, rank, for_memory=True) as process:
        answer = process.ask("memory", MEMORY_STEPS)
    return answer.get("peak_bytes"), answer.get("error", "")


def _times(
    where: Setting, named: Named, rounds: int, steps: int, say: Say
) -> list[tuple[list[float], str]]:
    """Per candidate (seconds a step in each round, error); no seconds where it failed in any
    round.
    """
    processes = [Process(where, method, rank) for method, rank in named]
    seconds: list[list[float]] = [[] for _ in named]
    try:
        for process, (method, rank) in zip(processes, named):
            say(f"warm-up of {label(method, rank)}")
            process.ask("time", WARM_UP_STEPS)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for place in range(len(named)):  # each round begins with another candidate
                index = (place + number) % len(named)
                answer = processes[index].ask("time", steps)
                if "seconds" in answer:
                    seconds[index].append(answer["seconds"])
        errors = [process.error for process in processes]
    finally:
        for process in processes:
            process.close()
    return [([] if error else found, error) for found, error in zip(seconds, errors)]
