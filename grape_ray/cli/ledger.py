"""``grape-ray ledger``: list, show, verify or extend the ledgers of datasets."""

from __future__ import annotations

import json

import click

from grape_ray.accounting.mechanism import RECORD
from grape_ray.errors import ConfigError, GrapeRayError, LedgerError
from grape_ray.ledger.audit import verify
from grape_ray.ledger.ledger import Ledger
from grape_ray.ledger.location import ledger_of
from grape_ray.ledger.registry import Known
from grape_ray.ledger.summary import summary
from grape_ray.storage import Json, Storage


@click.group("ledger")
def command() -> None:
    """List, show, verify or extend the ledgers of datasets.

    A ledger is named by its folder or URL, or by that of a run that it pays for.
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_all(as_json: bool) -> None:
    """All ledgers of your private datasets: budget, what is taken, spent and left, and their
    runs.
    """
    from grape_ray.ledger import registry

    rows = [_row(known) for known in registry.ledgers()]
    if as_json:
        click.echo(json.dumps({"ledgers": rows}))
        return
    if not rows:
        click.echo(
            "no ledger is known: a private run makes one, and public data keep theirs in each run's"
            " own folder"
        )
    for row in rows:
        click.echo(f"{row['dataset'] or 'unnamed records'}: {row['ledger']}")
        click.echo(f"  {row['problem'] or _balance(row)}")


@command.command("show")
@click.argument("place", metavar="LEDGER_OR_RUN")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(place: str, as_json: bool) -> None:
    """The budget of a dataset, its studies, and what their runs were charged; of RUN, its own
    charges first.
    """
    where, run = ledger_of(place)
    found = {"ledger": where, **summary(Ledger.open(where, create=False))}
    if run is not None:
        found["run"] = _run_of(found, run)
    if as_json:
        click.echo(json.dumps(found))
        return
    if run is not None:
        own = found["run"]
        click.echo(
            f"run {run}: {own['used']} steps charged in {own['attempts']} attempts, to study"
            f" {own['study']} of {where}"
        )
    click.echo(
        f"dataset {found['dataset_id']}: epsilon {found['epsilon']:g}, delta {found['delta']:g},"
        f" privacy unit {found['unit']}, {found['entries']} entries"
    )
    for extension in found["extensions"]:
        budget = f"epsilon {extension['epsilon']:g}, delta {extension['delta']:g}"
        click.echo(f"raised by entry {extension['seq']} to {budget}: {extension['reason']}")
    click.echo(
        f"left for further studies: epsilon {found['epsilon_left']:.6g}, delta"
        f" {found['delta_left']:.3g}"
    )
    _show_studies(found)
    if found["holder"]:
        click.echo(f"last held by {found['holder']}, epoch {found['epoch']}")


@command.command("verify")
@click.argument("place", metavar="LEDGER_OR_RUN")
@click.option("--head", help="Hash of an entry, noted earlier, that must still be there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(place: str, head: str | None, as_json: bool) -> None:
    """Walk the chain: every entry, link and sum; exit status 2 where anything is wrong."""
    report = verify(ledger_of(place)[0], head)
    if not as_json:
        for problem in report.problems:
            click.echo(problem)
        if report.ok:
            click.echo(f"{report.url}: {report.entries} entries, all in order, head {report.head}")
    else:
        fields = {
            "ok": report.ok,
            "entries": report.entries,
            "head": report.head,
            "problems": list(report.problems),
        }
        click.echo(json.dumps({"ledger": report.url, **fields}))
    if not report.ok:
        raise LedgerError(
            "the ledger does not verify",
            f"{len(report.problems)} problems",
            "none",
            "restore it from a copy",
        )


@command.command("extend")
@click.argument("place", metavar="LEDGER_OR_RUN")
@click.option("--epsilon", type=float, help="The dataset's new whole epsilon; by default it stays.")
@click.option("--delta", type=float, help="The dataset's new whole delta; by default it stays.")
@click.option("--reason", help="Who wanted it, and why; it stays in the ledger.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def extend(
    place: str, epsilon: float | None, delta: float | None, reason: str | None, as_json: bool
) -> None:
    """Raise the whole budget of a dataset, for further studies; those that are registered keep
    their shares.

    Everything that was ever trained on these records, together, is then guaranteed under the new
    epsilon and delta, not under the old.
    """
    if epsilon is None and delta is None:
        fix = "name the new whole budget, not what is added"
        raise ConfigError("ledger extend needs a budget", None, "--epsilon, --delta or both", fix)
    ledger = Ledger.open(ledger_of(place)[0], create=False)
    ledger.extend(epsilon, delta, reason or "")
    found = summary(ledger)
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(
        f"dataset {found['dataset_id']}: epsilon {found['epsilon']:g}, delta {found['delta']:g}"
        " from now on"
    )
    click.echo(
        f"left for further studies: epsilon {found['epsilon_left']:.6g}, delta"
        f" {found['delta_left']:.3g}"
    )


def _row(known: Known) -> Json:
    """A line of the list; a ledger that cannot be read is listed with its problem."""
    row: Json = {
        "dataset": known.dataset,
        "ledger": known.place,
        "ledger_id": known.ledger_id,
        "problem": None,
    }
    try:
        found = summary(Ledger.open(Storage(known.place).first_contact(), create=False))
    except GrapeRayError as error:
        return {**row, "problem": str(error)}
    if found["ledger_id"] != known.ledger_id:
        return {
            **row,
            "problem": (
                "another ledger lies in its place: restore the one that these records were"
                " charged to"
            ),
        }
    runs = [run for study in found["studies"].values() for run in study["runs"]]
    fields = (
        "unit",
        "epsilon",
        "delta",
        "epsilon_left",
        "delta_left",
        "epsilon_spent",
        "extensions",
    )
    return {
        **row,
        **{name: found[name] for name in fields},
        "studies": len(found["studies"]) + len(found["selections"]),
        "runs": runs,
    }


def _balance(row: Json) -> str:
    """What a dataset has and has left, in a line."""
    taken = (
        f"{row['epsilon'] - row['epsilon_left']:.4g} taken by {row['studies']} studies"
        f" ({row['epsilon_spent']:.4g} spent so far)"
    )
    raised = (
        f"; raised {len(row['extensions'])} times, last: {row['extensions'][-1]['reason']}"
        if row["extensions"]
        else ""
    )
    left = f"{row['epsilon_left']:.4g} left; delta {row['delta']:g}, {row['delta_left']:.3g} left"
    unit = "" if row["unit"] == RECORD else f"privacy unit {row['unit']}, "
    return f"{unit}epsilon {row['epsilon']:g}, {taken}, {left}; {len(row['runs'])} runs{raised}"


def _run_of(found: Json, run: str) -> Json:
    """What a run was charged, and to which study; nothing yet where no study knows it."""
    for name, study in found["studies"].items():
        if run in study["runs"]:
            return {"name": run, "study": name, **study["runs"][run]}
    return {
        "name": run,
        "study": run if run in found["studies"] else None,
        "attempts": 0,
        "used": 0,
    }


def _show_studies(found: Json) -> None:
    for name, study in found["studies"].items():
        steps = f"{study['used']} of {study['tokens']} steps charged, {study['left']} left"
        spent = (
            f"epsilon {study['epsilon_spent']:.4g} of {study['epsilon']:g} at delta"
            f" {study['delta']:g}"
        )
        click.echo(
            f"study {name}: {steps}; {spent}; noise multiplier"
            f" {study['mechanism']['noise_multiplier']:.6g}"
        )
        for run, counts in study["runs"].items():
            click.echo(f"  run {run}: {counts['used']} steps in {counts['attempts']} attempts")
    for name, selection in found["selections"].items():
        spent = f"epsilon {selection['epsilon']:g} at delta {selection['delta']:g}, spent whole"
        best = f"the best of a secret number of trials, {selection['mean']:g} on average"
        click.echo(f"selection {name}: {best}, {selection['trial_tokens']} steps each; {spent}")
