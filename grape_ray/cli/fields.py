"""``grape-ray fields``: what a pipeline's fields are called, and what they mean."""

from __future__ import annotations

import dataclasses
import json
import textwrap

import click

from grape_ray.cli import options


@click.command("fields")
@click.argument("pipeline")
@click.argument("pattern", default="")
@options.as_json
def command(pipeline, pattern, as_json) -> None:
    """List the fields of PIPELINE that --set and run files can set, with their values; only those
    whose names hold PATTERN, where it is given.
    """
    from grape_ray.config.fields import fields_of
    from grape_ray.config.pipelines import pipeline as find_pipeline

    found = [info for info in fields_of(find_pipeline(pipeline)) if pattern in info.key]
    for info in found:
        click.echo(f"{info.key} = {_text(info.value)}  ({info.type})")
        if info.meaning:
            click.echo(
                textwrap.fill(info.meaning, 96, initial_indent="    ", subsequent_indent="    ")
            )
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(info) for info in found]))


def _text(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
