"""The folder of a sweep: how it was begun, its runs, and the table of its trials put together from
what they left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grape_ray.errors import ConfigError
from grape_ray.ledger.charges import Attempt
from grape_ray.ledger.ledger import Ledger
from grape_ray.ledger.location import RUN_FILE
from grape_ray.storage import Storage
from grape_ray.training.append_log import lines

SWEEP_FILE, RESULT_FILE = "sweep.json", "result.json"
RUNS, TUNE = "runs", "tune"
_DESCRIBED = {  # what a description holds at least, and of which types
    "sweep": str, "study": str, "mode": str, "options": dict, "fields": list, "metric": str,
    "config": dict, "ledger": str, "paid": dict, "score_source": str, "budget": list,
}  # fmt: skip
EXECUTED, REPORTS = "executed", "reports"  # traces below a run's folder


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
    values: Mapping[str, Any]
    steps: int
    score: float | None
    charged: int
    executed: int
    attempts: int
    reports: tuple[tuple[float, int, float], ...]
    done: bool


def read(folder: Storage) -> dict[str, Any]:
    """How a sweep was begun. Raises ConfigError where the folder holds no sweep."""
    try:
        found = json.loads(folder.read(SWEEP_FILE))
    except FileNotFoundError as error:
        raise ConfigError(
            "there is no sweep", folder.url, f"a folder with {SWEEP_FILE}", "check name and storage"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{SWEEP_FILE} of the sweep is damaged",
            str(error),
            "a JSON object",
            "restore it from a copy",
        ) from error
    wrong = [
        name
        for name, kind in _DESCRIBED.items()
        if not isinstance(found, dict) or not isinstance(found.get(name), kind)
    ]
    if wrong:
        got, expected = f"no usable {', '.join(wrong)}", "the JSON that its beginning wrote"
        raise ConfigError(
            f"{SWEEP_FILE} of the sweep is damaged", got, expected, "restore it from a copy"
        )
    return found


def trials(folder: Storage, sweep: Mapping[str, Any]) -> list[TrialRow]:
    """The runs of a sweep in mode compose, in the order in which they were begun."""
    known = Ledger.open(sweep["ledger"], create=False).state.study(sweep["study"]).runs
    names = sorted(
        {name.split("/")[1] for name in folder.list(f"{RUNS}/") if name.endswith(f"/{RUN_FILE}")}
    )
    order = {run: place for place, run in enumerate(known)}
    rows = [
        _row(folder.child(RUNS).child(name), name, sweep, known.get(name, [])) for name in names
    ]
    return sorted(rows, key=lambda row: order.get(row.run, len(order)))


def _row(
    run_folder: Storage, run: str, sweep: Mapping[str, Any], attempts: list[Attempt]
) -> TrialRow:
    described = json.loads(run_folder.read(RUN_FILE))
    values = {}
    for name in sweep["fields"]:
        node: Any = described
        for part in name.split("."):
            node = node["fields"][part] if part not in node and "fields" in node else node[part]
        values[name] = node
    metric = sweep["metric"]
    told = sorted(
        (json.loads(line) for line in lines(run_folder, REPORTS)), key=lambda report: report["time"]
    )
    scores = [
        (report["time"], report["step"], report[metric]) for report in told if metric in report
    ]
    reports = tuple(score for score in scores if math.isfinite(score[2]))
    return TrialRow(
        run=run,
        trial=run.partition(".")[0],
        values=values,
        steps=told[-1]["step"] if told else 0,
        score=scores[-1][2] if scores and math.isfinite(scores[-1][2]) else None,
        charged=sum(attempt.used for attempt in attempts),
        executed=len(lines(run_folder, EXECUTED)),
        attempts=len(attempts),
        reports=reports,
        done=bool(told) and told[-1]["done"],
    )


def best(rows: list[TrialRow]) -> TrialRow | None:
    """The run with the best last score, the one with more steps of equals; None without a score
    that is finite.
    """
    scored = (row for row in rows if row.score is not None and math.isfinite(row.score))
    return max(scored, key=lambda row: (row.score, row.steps), default=None)
