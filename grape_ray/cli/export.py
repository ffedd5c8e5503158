"""``grape-ray export``: a run's newest checkpoint as a folder that Hugging Face loads."""

from __future__ import annotations

import json
from pathlib import Path

import click

from grape_ray.cli import options


@click.command("export")
@click.argument("run")
@click.argument("folder")
@click.option("--push-to-hub", "name", help="Put the folder on the hub, as private OWNER/NAME.")
@options.trust_module
def command(run, folder, name, trust) -> None:
    """Write the model of RUN (a run's folder or URL) to FOLDER, for
    AutoModel....from_pretrained.
    """
    from grape_ray.training.export import PRIVACY_FILE, export, push

    step = export(run, folder, trust)
    stated = json.loads(Path(folder, PRIVACY_FILE).read_text())
    click.echo(
        f"{folder}: the model after step {step}"
        + ("" if stated["private"] else f"; {stated['statement']}")
    )
    if name:
        click.echo(push(folder, name))
