"""The page that a sweep ends with: one HTML file that needs nothing else, and the table of its
trials as Parquet.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grape_ray.accounting import calibration
from grape_ray.errors import ConfigError
from grape_ray.ledger.entries import Study
from grape_ray.ledger.history import Spending, history
from grape_ray.storage import Storage
from grape_ray.tuning import results
from grape_ray.tuning.options import SELECT
from grape_ray.tuning.results import TrialRow
from grape_ray.tuning.svg import Plot, categories, fitting, linear

_CURVE_POINTS = 24  # of epsilon against tokens; between them it is interpolated


def report(url: str) -> tuple[str, bytes]:
    """(The page, the Parquet table) of a sweep's folder, finished or not.

    Raises:
        ConfigError: no sweep is there, or it is a private selection that has not ended.
            LedgerError: its ledger cannot be read.
    """
    place = Storage(url)
    sweep = results.read(place)
    if sweep["mode"] == SELECT:
        return _selection(place, sweep)
    rows = results.trials(place, sweep)
    return _compose(sweep, rows), _table(sweep, rows)


def _compose(sweep: Mapping[str, Any], rows: list[TrialRow]) -> str:
    study, best = Study.from_payload(sweep["paid"]), results.best(rows)
    spent = history(sweep["ledger"], study.name)
    charged, executed = sum(row.charged for row in rows), sum(row.executed for row in rows)
    naive = (
        calibration.epsilon(study.mechanism, best.steps, study.delta)
        if best and best.steps
        else None
    )
    facts = [
        (
            "the sweep's epsilon",
            f"{study.epsilon:g}",
            f"delta {study.delta:g}; holds for the winner and all else that is released",
        ),
        (
            "the naive epsilon",
            f"{naive:.2f}" if naive else "-",
            "of the winner's own steps: not what tuning costs",
        ),
        (
            "step tokens charged",
            f"{charged:,}",
            f"of {study.tokens:,}; {executed:,} steps executed",
        ),
        (
            "trials",
            f"{len({row.trial for row in rows})}",
            f"{sum(row.attempts for row in rows)} attempts, {len(rows)} runs",
        ),
    ]
    sections = [_tiles(facts)]
    if best is not None:
        sections.insert(0, _headline(sweep, best.score, best.values, study.epsilon, naive))
    scored = [row for row in rows if row.score is not None]
    if scored:
        parameters = "".join(
            _parameter(name, sweep["metric"], scored, best) for name in sweep["fields"]
        )
        sections.append(
            "<h2>Score by parameter</h2><p>A dot a run, larger the longer it trained.</p><div"
            f" class=plots>{parameters}</div>"
        )
        sections.append(
            "<h2>Trials over time</h2><div"
            f" class=plots>{_curves(sweep, scored, best)}{_timeline(rows, spent, best)}</div>"
        )
    if spent:
        sections.append(f"<h2>Budget burned</h2><div class=plots>{_burned(study, spent)}</div>")
    sections.append(_rows(sweep, rows, best))
    return _page(sweep, sections)


def _selection(place: Storage, sweep: Mapping[str, Any]) -> tuple[str, bytes]:
    """The page of a private selection knows the winner and nothing else."""
    import json

    if not place.exists(results.RESULT_FILE):
        raise ConfigError(
            "the private selection has not ended",
            place.url,
            "a finished sweep",
            "its trials are sealed: resume it first",
        )
    result, paid = json.loads(place.read(results.RESULT_FILE)), sweep["paid"]
    best = result["best"]
    sections = []
    naive = best and best["naive_epsilon"]
    if best is not None:
        sections.append(_headline(sweep, best["score"], best["config"], paid["epsilon"], naive))
    facts = [
        (
            "the selection's epsilon",
            f"{paid['epsilon']:g}",
            f"delta {paid['delta']:g}; paid before the first trial",
        ),
        (
            "the naive epsilon",
            f"{naive:.2f}" if naive else "-",
            "of the winner's own steps: not what tuning costs",
        ),
        (
            "trials",
            "secret",
            (
                f"{paid['mean']:g} on average, {paid['law'].replace('_', ' ')} law, shape"
                f" {paid['shape']:g}"
            ),
        ),
    ]
    sections += [
        _tiles(facts),
        "<p>Nothing but the winner was released; the other trials are destroyed.</p>",
    ]
    table = pa.Table.from_pylist(
        [{"run": best["run"], **best["config"], "steps": best["steps"], "score": best["score"]}]
        if best
        else []
    )
    return _page(sweep, sections), _parquet(table)


def _headline(
    sweep: Mapping[str, Any],
    score: float | None,
    values: Mapping[str, Any],
    epsilon: float,
    naive: float | None,
) -> str:
    settings = ", ".join(
        f"<b>{escape(_short(name))}</b> {escape(_value(value))}" for name, value in values.items()
    )
    noised = ", noised" if sweep["score_source"] == "private" else ""
    beside = f" (naively {naive:.2f})" if naive else ""
    told = (
        f"{escape(sweep['metric'])} <b>{score:.4f}</b>{noised}, at epsilon"
        f" <b>{epsilon:g}</b>{beside}"
    )
    return f"<p class=headline>{told}, with {settings}</p>"


def _tiles(facts: Sequence[tuple[str, str, str]]) -> str:
    tiles = "".join(
        f"<div class=tile><span>{escape(a)}</span><b>{escape(b)}</b><span>{escape(c)}</span></div>"
        for a, b, c in facts
    )
    return f"<div class=tiles>{tiles}</div>"


def _parameter(name: str, metric: str, rows: list[TrialRow], best: TrialRow | None) -> str:
    plot = Plot(
        fitting(_short(name), [row.values[name] for row in rows]),
        linear(metric, [row.score or 0.0 for row in rows]),
    )
    longest = max(row.steps for row in rows) or 1
    for row in sorted(rows, key=lambda row: row is best):
        plot.dot(
            row.values[name], row.score, _style(row, best), _about(row), 3 + 4 * row.steps / longest
        )
    return (
        f"<figure><figcaption>{escape(metric)} by"
        f" {escape(_short(name))}</figcaption>{plot.text}</figure>"
    )


def _curves(sweep: Mapping[str, Any], rows: list[TrialRow], best: TrialRow | None) -> str:
    points = [report for row in rows for report in row.reports]
    plot = Plot(
        linear("step", [step for _, step, _ in points], zero=True),
        linear("score", [score for *_, score in points]),
    )
    for row in sorted(rows, key=lambda row: row is best):
        plot.line(
            [(step, score) for _, step, score in row.reports],
            f"line {_style(row, best)}",
            _about(row),
        )
        plot.dot(row.reports[-1][1], row.reports[-1][2], _style(row, best), _about(row), 3)
    return (
        f"<figure><figcaption>{escape(sweep['metric'])} as trials go"
        f" on</figcaption>{plot.text}</figure>"
    )


def _timeline(rows: list[TrialRow], spent: Sequence[Spending], best: TrialRow | None) -> str:
    """A bar an attempt, from its first charge to its last sign of life."""
    began = min(s.time for s in spent) if spent else 0.0
    spans: list[tuple[TrialRow, float, float]] = []
    for row in rows:
        numbers = sorted({s.attempt for s in spent if s.run == row.run})
        starts = [min(s.time for s in spent if (s.run, s.attempt) == (row.run, n)) for n in numbers]
        for n, start in enumerate(starts):
            until = starts[n + 1] if n + 1 < len(starts) else float("inf")
            alive = [s.time for s in spent if s.run == row.run] + [time for time, *_ in row.reports]
            spans.append((row, start, max([start, *(t for t in alive if start <= t < until)])))
    if not spans:
        return ""
    names = {row.run: n for n, row in enumerate(reversed(rows))}
    axis = categories("run", list(names.values()))
    quiet = type(axis)("run", axis.place, [(place, "") for place in names.values()])
    height = 60 + 18 * max(len(rows), 5)
    plot = Plot(
        linear("seconds since the first charge", [end - began for *_, end in spans], zero=True),
        quiet,
        height=height,
    )
    for row, start, end in spans:
        plot.bar(start - began, end - began, names[row.run], _style(row, best), _about(row))
    return (
        "<figure><figcaption>When each run trained, a bar an"
        f" attempt</figcaption>{plot.text}</figure>"
    )


def _burned(study: Study, spent: Sequence[Spending]) -> str:
    began, used, points = spent[0].time, 0, [(0.0, 0)]
    for entry in spent:
        used += entry.steps
        points.append((entry.time - began, used))
    knots = np.unique(np.linspace(1, max(1, *(n for _, n in points)), _CURVE_POINTS).astype(int))
    cost = [0.0, *(study.epsilon_of(int(n)) for n in knots)]
    curve = [(time, float(np.interp(n, [0, *knots], cost))) for time, n in points]
    plot = Plot(
        linear("seconds since the first charge", [t for t, _ in curve]),
        linear("epsilon", [study.epsilon], zero=True),
        width=640,
    )
    plot.line(curve, "line burned", steps=True)
    plot.level(study.epsilon, f"the sweep's budget, epsilon {study.epsilon:g}")
    return (
        "<figure class=wide><figcaption>Epsilon of the steps charged so far, all trials"
        f" together</figcaption>{plot.text}</figure>"
    )


def _rows(sweep: Mapping[str, Any], rows: list[TrialRow], best: TrialRow | None) -> str:
    heads = [
        "run",
        *(_short(name) for name in sweep["fields"]),
        "steps",
        sweep["metric"],
        "charged",
        "executed",
        "attempts",
    ]
    lines = []
    for row in sorted(rows, key=lambda row: -(row.score if row.score is not None else -np.inf)):
        score = "-" if row.score is None else f"{row.score:.4f}"
        cells = [
            row.run,
            *(_value(row.values[name]) for name in sweep["fields"]),
            row.steps,
            score,
            row.charged,
            row.executed,
            row.attempts,
        ]
        mark = ' class="best"' if row is best else ""
        lines.append(
            f"<tr{mark}>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"
        )
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    return (
        f"<h2>Runs</h2><div class=scroll><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _table(sweep: Mapping[str, Any], rows: list[TrialRow]) -> bytes:
    facts = ("run", "trial", "steps", "score", "charged", "executed", "attempts", "done")
    plain = [
        {
            **{fact: getattr(row, fact) for fact in facts},
            **{name: row.values[name] for name in sweep["fields"]},
        }
        | {
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


def _page(sweep: Mapping[str, Any], sections: Sequence[str]) -> str:
    style = files("grape_ray.tuning").joinpath("page.css").read_text()
    name, mode = escape(sweep["sweep"]), escape(sweep["mode"])
    about = (
        f"{escape(sweep['options']['space'])}, mode {mode}, score from"
        f" {escape(sweep['score_source'])} validation records"
    )
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Sweep'
        f" {name}</title><style>{style}</style>"
    )
    return (
        f"<!doctype html><html lang=en><head>{head}</head><body><h1>Sweep"
        f" {name}</h1><p>{about}</p>{''.join(sections)}</body></html>\n"
    )


def _about(row: TrialRow) -> str:
    values = ", ".join(f"{_short(name)} {_value(value)}" for name, value in row.values.items())
    return (
        f"{row.run}: {row.score:.4f} after {row.steps} steps; {values}"
        if row.score is not None
        else f"{row.run}: {values}"
    )


def _style(row: TrialRow, best: TrialRow | None) -> str:
    return "best" if row is best else "run"


def _short(name: str) -> str:
    return name.rpartition(".")[2].replace("_", " ")


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
