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
@options.assignments("a field or parameter, such as size=tiny")
@options.as_json
def command(pipeline, pattern, assignments, as_json) -> None:
    """List the parameters of PIPELINE, if it has any, and the fields that --set and run files can
    set, with their values; only those whose names hold PATTERN, where it is given.
    """
    from grape_ray.config.fields import fields_of
    from grape_ray.config.pipelines import pipeline as find_pipeline
    from grape_ray.config.pipelines import pipeline_parameters

    config = find_pipeline(pipeline, assignments)
    listed = [*pipeline_parameters(pipeline, assignments), *fields_of(config)]
    found = [info for info in listed if pattern in info.key]
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
