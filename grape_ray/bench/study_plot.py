"""A study as a picture: the metric's mean and spread against the first setting, a line for each
combination of the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from grape_ray.bench.study import StudyRun, cases


def draw(
    runs: Sequence[StudyRun], varied: Mapping[str, Sequence[str]], metric: str, path: Path
) -> None:
    """Writes the picture, as SVG or whatever the path's ending says."""
    from matplotlib.figure import Figure

    first, *others = varied
    places = {value: place for place, value in enumerate(varied[first])}
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).add_subplot()
    for rest in cases({name: varied[name] for name in others}):
        found = {
            value: [run.metrics[metric] for run in runs if run.case == (value, *rest)]
            for value in varied[first]
        }
        found = {value: got for value, got in found.items() if got}
        axes.errorbar(
            [places[value] for value in found],
            [statistics.mean(got) for got in found.values()],
            [statistics.stdev(got) if len(got) > 1 else 0.0 for got in found.values()],
            marker="o",
            capsize=3,
            label=", ".join(f"{n.rpartition('.')[2]} {v}" for n, v in zip(others, rest)) or None,
        )
    axes.set_xticks(list(places.values()), list(places))
    axes.set_xlabel(first)
    axes.set_ylabel(metric)
    if others:
        axes.legend()
    figure.savefig(path)
