"""The runs of a sweep in mode compose, put together from their folders and the ledger."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from grape_ray.ledger.charges import Attempt
from grape_ray.ledger.ledger import Ledger
from grape_ray.ledger.location import RUN_FILE
from grape_ray.storage import Json, Storage
from grape_ray.training.append_log import lines
from grape_ray.tuning.folder import EXECUTED, REPORTS, RUNS


@dataclass(frozen=True)
class TrialRow:
    """What one run of a sweep did.

    Attributes:
        run: its name; trial: the trial that it belongs to (population-based training has several
            runs a trial).
        values: of the varied fields. steps: of its model at its last report; score: then, None
            without one that is finite.
        charged, executed: step tokens it burned, and steps its processes counted. attempts: how
            often it was begun.
        reports: (time in seconds since 1970, step, score) each, of finite scores; done: whether it
            reached its own end.
    """

    run: str
    trial: str
    values: Json
    steps: int
    score: float | None
    charged: int
    executed: int
    attempts: int
    reports: tuple[tuple[float, int, float], ...]
    done: bool


def rows(folder: Storage, sweep: Json) -> list[TrialRow]:
    """The runs of a sweep in mode compose, in the order in which they were begun."""
    known = Ledger.open(sweep["ledger"], create=False).state.study(sweep["study"]).runs
    names = sorted(
        {name.split("/")[1] for name in folder.list(f"{RUNS}/") if name.endswith(f"/{RUN_FILE}")}
    )
    order = {run: place for place, run in enumerate(known)}
    found = [
        _row(folder.child(RUNS).child(name), name, sweep, known.get(name, [])) for name in names
    ]
    return sorted(found, key=lambda row: order.get(row.run, len(order)))


def _row(run_folder: Storage, run: str, sweep: Json, attempts: list[Attempt]) -> TrialRow:
    described = json.loads(run_folder.read(RUN_FILE))
    values = {}
    for name in sweep["fields"]:
        node = described
        for part in name.split("."):
            node = node["fields"][part] if part not in node and "fields" in node else node[part]
        values[name] = node
    metric = sweep["metric"]
    reported = sorted(
        (json.loads(line) for line in lines(run_folder, REPORTS)), key=lambda report: report["time"]
    )
    scores = [
        (report["time"], report["step"], report[metric]) for report in reported if metric in report
    ]
    reports = tuple(score for score in scores if math.isfinite(score[2]))
    return TrialRow(
        run=run,
        trial=run.partition(".")[0],
        values=values,
        steps=reported[-1]["step"] if reported else 0,
        score=scores[-1][2] if scores and math.isfinite(scores[-1][2]) else None,
        charged=sum(attempt.used for attempt in attempts),
        executed=len(lines(run_folder, EXECUTED)),
        attempts=len(attempts),
        reports=reports,
        done=bool(reported) and reported[-1]["done"],
    )


def best(rows: list[TrialRow]) -> TrialRow | None:
    """The run with the best last score, the one with more steps of equals; None without a score
    that is finite.
    """
    scored = (row for row in rows if row.score is not None and math.isfinite(row.score))
    return max(scored, key=lambda row: (row.score, row.steps), default=None)
