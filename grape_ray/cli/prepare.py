"""``grape-ray prepare``: a dataset encoded once, for a cluster."""

from __future__ import annotations

import click

from grape_ray.cli import options


@click.command("prepare")
@click.argument("pipeline")
@options.assignments("a field, such as task.max_tokens=64")
@click.option("--out", required=True, help="Folder or URL (s3://...) of the prepared set.")
@click.option("--shards", default=64, show_default=True, help="Files of it, at most.")
def command(pipeline, assignments, out, shards) -> None:
    """Encode the records of PIPELINE on the cluster at hand (by Ray Data) and write them to --out.

    Train on it with `--set task.data=OUT`: a node fetches the shards that its workers train on, and
    nothing is encoded again.
    """
    from grape_ray.config.pipelines import pipeline as find_pipeline
    from grape_ray.errors import ConfigError

    if shards < 1:
        raise ConfigError("--shards", shards, "an integer >= 1", "several times the nodes")
    config = find_pipeline(pipeline, assignments)
    from grape_ray.ray_backend.prepare_set import prepare_set

    count = prepare_set(config, out, shards)
    click.echo(f"{out}: {count} training records; train with --set task.data={out}")
