"""``grape-ray batches``: batch sizes that cost the same, in compute and in privacy."""

from __future__ import annotations

import dataclasses
import json

import click

from grape_ray.accounting.batches import largest_batch, schedules
from grape_ray.cli import options


@click.command("batches")
@click.option("--units", type=int, required=True, help="Number of privacy units: records, users.")
@click.option("--epochs", type=float, required=True, help="Passes over them that you can pay for.")
@click.option("--epsilon", type=float, required=True, help="Privacy budget, epsilon.")
@click.option("--delta", type=float, required=True, help="Privacy budget, delta.")
@options.as_json
def command(units, epochs, epsilon, delta, as_json) -> None:
    """Which batch makes most of a number of passes over the data.

    Each line is one way to spend the same compute and the same budget. Signal is what a run sees
    through its noise, relative to the best of them; the marked one is the largest that leaves
    enough steps to learn in.
    """
    found, advised = schedules(units, epochs, epsilon, delta), largest_batch(units, epochs)
    if as_json:
        rows = [{**dataclasses.asdict(one), "signal": one.signal} for one in found]
        click.echo(json.dumps({"schedules": rows, "advised_batch": advised}))
        return
    best = max((one.signal for one in found), default=1.0)
    click.echo(f"{'batch':>8}{'steps':>8}{'noise multiplier':>19}{'signal':>9}")
    for one in found:
        mark = "  <-" if one.batch == advised else ""
        click.echo(
            f"{one.batch:>8}{one.steps:>8}{one.noise_multiplier:>19.3f}"
            f"{one.signal / best:>9.2f}{mark}"
        )
