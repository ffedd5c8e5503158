"""``grape-ray init``: a first run file for a dataset."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("init")
@click.argument("task")
@click.option("--data", required=True, help="The records, as task.data takes them.")
@click.option("--model", default="", help="Hub name or folder; by default a small public one.")
@click.option("--epsilon", default=3.0, show_default=True, help="The guarantee.")
@click.option("--out", default="run.yaml", show_default=True, help="The file to write.")
def command(task, data, model, epsilon, out) -> None:
    """Write a run file for TASK (text-classification, text-generation, ...) with what is found in
    --data: columns, labels, privacy units, and settings for its size.

    The file says labels and numbers that were read from the data: look at it before you share it.
    """
    from grape_ray.accounting.mechanism import check_epsilon
    from grape_ray.errors import ConfigError
    from grape_ray.training.init import check_kind, look, run_file

    check_kind(task)
    check_epsilon(epsilon, "--epsilon")
    if Path(out).exists():
        raise ConfigError("--out", out, "a new file", "name another, or remove it")
    found = look(task, data)
    Path(out).write_text(run_file(task, data, model, found, epsilon))
    columns = ", ".join(f"{name} {column}" for name, column in found.fields.items())
    click.echo(f"{out}: {found.records} records; {columns}")
    click.echo(f"look at it, then run `grape-ray train {out}`")
