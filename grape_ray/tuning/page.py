"""The page that a sweep ends with: one HTML file that needs nothing else, and the table of its
runs as Parquet.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grape_ray.errors import ConfigError
from grape_ray.ledger.entries import Study
from grape_ray.ledger.history import Spending, history
from grape_ray.storage import Json, Storage
from grape_ray.tuning import folder, plots, results, trials
from grape_ray.tuning.options import SELECT
from grape_ray.tuning.plots import Plot, Span, short, value_text
from grape_ray.tuning.trials import TrialRow

_CURVE_POINTS = 24  # of epsilon against tokens; between them it is interpolated
_RUN_FACTS = ("steps", "score", "charged", "executed", "attempts")
_NOT_THE_COST = "of the winner's own steps: not what tuning costs"


def report(url: str) -> tuple[str, bytes]:
    """(The page, the Parquet table) of a sweep's folder, finished or not.

    Raises:
        ConfigError: no sweep is there, or it is a private selection that has not ended.
        LedgerError: its ledger cannot be read.
    """
    place = Storage(url)
    sweep = folder.read(place)
    if sweep["mode"] == SELECT:
        return _selection(place, sweep)
    rows = trials.rows(place, sweep)
    return _compose(sweep, rows), _table(sweep, rows)


def _compose(sweep: Json, rows: list[TrialRow]) -> str:
    study, best = Study.from_payload(sweep["paid"]), trials.best(rows)
    naive = results.naive_epsilon(study.mechanism, best.steps, study.delta) if best else None
    charged, executed = sum(row.charged for row in rows), sum(row.executed for row in rows)
    attempts, known = sum(row.attempts for row in rows), {row.trial for row in rows}
    tiles = [
        (
            "the sweep's epsilon",
            f"{study.epsilon:g}",
            f"delta {study.delta:g}; holds for the winner and all else that is released",
        ),
        ("the naive epsilon", f"{naive:.2f}" if naive else "-", _NOT_THE_COST),
        (
            "step tokens charged",
            f"{charged:,}",
            f"of {study.tokens:,}; {executed:,} steps executed",
        ),
        ("trials", f"{len(known)}", f"{attempts} attempts, {len(rows)} runs"),
    ]
    headline = best and {
        "score": best.score,
        "config": best.values,
        "epsilon": study.epsilon,
        "naive": naive,
    }
    return _page(
        sweep=sweep,
        headline=headline,
        tiles=tiles,
        sections=_sections(sweep, study, rows, best),
        heads=["run", *map(short, sweep["fields"]), "steps", sweep["metric"], *_RUN_FACTS[2:]],
        rows=sorted(rows, key=lambda row: np.inf if row.score is None else -row.score),
        best=best,
    )


def _selection(place: Storage, sweep: Json) -> tuple[str, bytes]:
    """The page of a private selection knows the winner and nothing else."""
    result = results.load(place)
    if result is None:
        raise ConfigError(
            "the private selection has not ended",
            place.url,
            "a finished sweep",
            "its trials are sealed: resume it first",
        )
    paid, best = sweep["paid"], result.best
    naive = best.naive_epsilon if best else None
    distribution = f"{paid['law'].replace('_', ' ')} distribution, shape {paid['shape']:g}"
    tiles = [
        (
            "the selection's epsilon",
            f"{paid['epsilon']:g}",
            f"delta {paid['delta']:g}; paid before the first trial",
        ),
        ("the naive epsilon", f"{naive:.2f}" if naive else "-", _NOT_THE_COST),
        ("trials", "secret", f"{paid['mean']:g} on average, {distribution}"),
    ]
    headline = best and {
        "score": best.score,
        "config": best.config,
        "epsilon": result.epsilon,
        "naive": naive,
    }
    winner = best and {"run": best.run, **best.config, "steps": best.steps, "score": best.score}
    table = pa.Table.from_pylist([winner] if winner else [])
    return _page(sweep=sweep, headline=headline, tiles=tiles, sections=[]), _parquet(table)


def _sections(
    sweep: Json, study: Study, rows: list[TrialRow], best: TrialRow | None
) -> list[tuple[str, str, list[Plot]]]:
    """(Heading, note, plots) each."""
    metric, spent = sweep["metric"], history(sweep["ledger"], study.name)
    scored = [row for row in rows if row.score is not None]
    spans, found = _spans(rows, spent), []
    if scored:
        fields = sweep["fields"]
        by_field = [plots.by_parameter(name, short(name), metric, scored, best) for name in fields]
        note = "A dot a run, larger the longer it trained."
        found.append(("Score by parameter", note, by_field))
        over_time = [plots.over_steps(metric, scored, best)]
        over_time += [plots.timeline(rows, spans, best)] if spans else []
        found.append(("Trials over time", "", over_time))
    if spent:
        found.append(("Budget burned", "", [plots.budget(_curve(study, spent), study.epsilon)]))
    return found


def _spans(rows: Sequence[TrialRow], spent: Sequence[Spending]) -> list[Span]:
    """Each attempt, from its first charge to its last charge or report before the next one."""
    began = min((s.time for s in spent), default=0.0)
    spans = []
    for row in rows:
        charges = [s for s in spent if s.run == row.run]
        numbers = sorted({s.attempt for s in charges})
        starts = [min(s.time for s in charges if s.attempt == n) for n in numbers]
        times = [s.time for s in charges] + [time for time, *_ in row.reports]
        for start, until in zip(starts, [*starts[1:], np.inf]):
            end = max(time for time in (start, *times) if start <= time < until or time == start)
            spans.append(Span(row, start - began, end - began))
    return spans


def _curve(study: Study, spent: Sequence[Spending]) -> list[tuple[float, float]]:
    """(Seconds since the first charge, epsilon of the steps charged by then) each."""
    used = np.cumsum([0, *(entry.steps for entry in spent)])
    seconds = [0.0, *(entry.time - spent[0].time for entry in spent)]
    knots = np.unique(np.linspace(1, max(1, *used), _CURVE_POINTS).astype(int))
    cost = [0.0, *(study.epsilon_of(int(n)) for n in knots)]
    return list(zip(seconds, map(float, np.interp(used, [0, *knots], cost))))


def _table(sweep: Json, rows: list[TrialRow]) -> bytes:
    facts = ("run", "trial", *_RUN_FACTS, "done")
    plain = [
        {
            **{fact: getattr(row, fact) for fact in facts},
            **{name: row.values[name] for name in sweep["fields"]},
            "first_report_time": row.reports[0][0] if row.reports else None,
            "last_report_time": row.reports[-1][0] if row.reports else None,
        }
        for row in rows
    ]
    return _parquet(pa.Table.from_pylist(plain))


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _page(**context: object) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"short": short, "value_text": value_text}
    template = environment.from_string(files("grape_ray.tuning").joinpath("page.html").read_text())
    return template.render({"palette": plots.PALETTE, "rows": [], **context}) + "\n"
