"""``grape-ray ledger``: show or verify the ledger of a dataset."""

from __future__ import annotations

import json

import click

from grape_ray.accounting.ledger import Ledger
from grape_ray.accounting.verify import verify
from grape_ray.errors import LedgerError


@click.group("ledger")
def command() -> None:
    """Show or verify the ledger of a dataset (a local folder or any fsspec URL)."""


@command.command("show")
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(uri: str, as_json: bool) -> None:
    """The budget of a dataset, its studies, and what their runs were charged."""
    summary = _summary(Ledger.open(uri, create=False))
    if as_json:
        click.echo(json.dumps(summary))
        return
    click.echo(f"dataset {summary['dataset_id']}: epsilon {summary['epsilon']:g}, delta {summary['delta']:g}, {summary['entries']} entries")
    click.echo(f"left for further studies: epsilon {summary['epsilon_left']:.6g}, delta {summary['delta_left']:.3g}")
    for name, study in summary["studies"].items():
        steps = f"{study['used']} of {study['tokens']} steps charged, {study['left']} left"
        spent = f"epsilon {study['epsilon_spent']:.4g} of {study['epsilon']:g} at delta {study['delta']:g}"
        click.echo(f"study {name}: {steps}; {spent}; noise multiplier {study['mechanism']['noise_multiplier']:.6g}")
        for run, counts in study["runs"].items():
            click.echo(f"  run {run}: {counts['used']} steps in {counts['attempts']} attempts")
    for name, selection in summary["selections"].items():
        spent = f"epsilon {selection['epsilon']:g} at delta {selection['delta']:g}, spent whole"
        law = f"the best of a secret number of trials, {selection['mean']:g} on average"
        click.echo(f"selection {name}: {law}, {selection['trial_tokens']} steps each; {spent}")
    if summary["holder"]:
        click.echo(f"last held by {summary['holder']}, epoch {summary['epoch']}")


@command.command("verify")
@click.argument("uri")
@click.option("--head", help="Hash of an entry, noted earlier, that must still be there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(uri: str, head: str | None, as_json: bool) -> None:
    """Walk the chain: every entry, link and sum; exit status 2 where anything is wrong."""
    report = verify(uri, head)
    if not as_json:
        for problem in report.problems:
            click.echo(problem)
        if report.ok:
            click.echo(f"{report.url}: {report.entries} entries, all in order, head {report.head}")
    else:
        fields = {"ok": report.ok, "entries": report.entries, "head": report.head, "problems": list(report.problems)}
        click.echo(json.dumps({"ledger": report.url, **fields}))
    if not report.ok:
        raise LedgerError("the ledger does not verify", f"{len(report.problems)} problems", "none", "restore it from a copy")


def _summary(ledger: Ledger) -> dict:
    """The state as plain values."""
    state = ledger.state
    studies = {}
    for name, known in state.studies.items():
        runs = {run: {"attempts": len(tries), "used": sum(t.used for t in tries)} for run, tries in known.runs.items()}
        counts = {"used": known.used, "left": known.left, "epsilon_spent": ledger.epsilon_spent(name), "runs": runs}
        studies[name] = {**known.study.payload(), **counts}
    budget = {"dataset_id": state.dataset_id, "ledger_id": state.ledger_id, "epsilon": state.epsilon, "delta": state.delta}
    selections = {name: selection.payload() for name, selection in state.selections.items()}
    taken = {unit: sum(part[unit] for part in (*studies.values(), *selections.values())) for unit in ("epsilon", "delta")}
    left = {f"{unit}_left": max(0.0, budget[unit] - taken[unit]) for unit in taken}
    chain = {"entries": state.next_seq, "head": state.head, "epoch": state.epoch, "holder": state.holder}
    return {**budget, **left, **chain, "studies": studies, "selections": selections}
