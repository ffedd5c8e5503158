"""``grape-ray export``: a run's newest checkpoint as a folder that Hugging Face loads."""

from __future__ import annotations

import click


@click.command("export")
@click.argument("run")
@click.argument("folder")
@click.option("--trust-module", "trust", multiple=True, metavar="MODULE",
              help="A module of yours that the run's task may be imported from; repeatable.")  # fmt: skip
def command(run, folder, trust) -> None:
    """Write the model of RUN (a run's folder or URL) to FOLDER, for AutoModel....from_pretrained."""
    from grape_ray.export import export

    step = export(run, folder, trust)
    click.echo(f"{folder}: the model after step {step}")
