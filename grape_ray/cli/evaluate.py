"""``grape-ray evaluate``: a run's newest checkpoint on its validation records, again."""

from __future__ import annotations

import json

import click

from grape_ray.cli import options


@click.command("evaluate")
@click.argument("run")
@options.trust_module
@options.as_json
def command(run, trust, as_json) -> None:
    """Evaluate the newest checkpoint of RUN (a run's folder or URL) on its public validation
    records, free of privacy cost.
    """
    from grape_ray.training.evaluate import evaluate

    found = evaluate(run, trust)
    click.echo(
        f"{found['run']} at step {found['step']}: "
        + ", ".join(f"{name} {value:.4f}" for name, value in found["metrics"].items())
    )
    if as_json:
        click.echo(json.dumps(found))
