"""``grape-ray predict``: a trained model's answers for new records."""

from __future__ import annotations

import click

from grape_ray.cli import options


@click.command("predict")
@click.argument("model")
@click.argument("file")
@click.option("--out", default="predictions.jsonl", show_default=True, help=".jsonl or .parquet.")
@options.trust_module
def command(model, file, out, trust) -> None:
    """Write what MODEL (a run's folder or URL, or a folder that export wrote) answers for the
    records of FILE: labels and probabilities, or texts.
    """
    from grape_ray.training.predict import predict

    count = predict(model, file, out, trust)
    click.echo(f"{out}: {count} answers")
