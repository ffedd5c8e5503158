"""``grape-ray check``: whether a model or pipeline can be trained privately, before anything is
paid for.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from grape_ray.cli import options

if TYPE_CHECKING:
    from grape_ray.config.schema import Config
    from grape_ray.training.preflight import Report


@click.command("check")
@click.argument("model_or_pipeline")
@click.option(
    "--method",
    "methods",
    multiple=True,
    help="Check this method; repeat for more. Default: the pipeline's own, or grape.",
)
@options.assignments(
    "a field, such as method.rank=8, or a parameter of the pipeline, such as size=tiny"
)
@options.as_json
def command(
    model_or_pipeline: str, methods: tuple[str, ...], assignments: tuple[str, ...], as_json: bool
) -> None:
    """Compare a few examples with separate backward passes, bound their norms, and see that every
    trainable tensor is noised.

    MODEL_OR_PIPELINE is a pipeline (pipelines.sst2, module:function, FILE.py), of which everything
    is done once that `train` will do, or a Hugging Face hub name or folder.
    """
    config, look = _target(model_or_pipeline, assignments)
    reports = []
    for name in methods or (config.method.name,):
        began = time.perf_counter()
        report = look(config.override([f"method.name={name}"]))
        reports.append(
            {**dataclasses.asdict(report), "seconds": round(time.perf_counter() - began, 3)}
        )
        if not as_json:
            click.echo(
                f"{name}: {report.tensors} tensors ({report.projected} projected),"
                f" {report.parameters:,} parameters noised as {report.coordinates:,} numbers;"
                f" largest difference from {report.examples} separate backward passes"
                f" {report.worst:.1e} ({report.worst_tensor})"
            )
    if as_json:
        click.echo(json.dumps({"target": model_or_pipeline, "ok": True, "reports": reports}))


def _target(
    reference: str, assignments: tuple[str, ...]
) -> tuple[Config, Callable[[Config], Report]]:
    """The config, and what gives a preflight's report for it: of a pipeline by a dry run, of a
    model with a made-up batch.
    """
    from grape_ray.config.pipelines import pipeline
    from grape_ray.config.schema import Config, Method
    from grape_ray.errors import ConfigError
    from grape_ray.models.sample import sample
    from grape_ray.training.preflight import preflight

    try:
        return pipeline(reference, assignments), _dry_run_report
    except ConfigError as missing:
        if (
            ":" in reference
            or reference.startswith("pipelines.")
            or reference.endswith(".py")
            or "not found" not in missing.what
        ):
            raise
        try:
            model, loss, batch = sample(reference)
        except ConfigError as error:
            raise ConfigError(
                "neither a pipeline nor a model", reference, str(missing), str(error)
            ) from error
    config = Config(task=None, method=Method(project_min_numel=4096)).override(assignments)
    return config, lambda config: preflight(model, loss, batch, config.privacy, config.method)


def _dry_run_report(config: Config) -> Report:
    """The report of a dry run, in a folder that is thrown away."""
    from grape_ray.storage import Storage
    from grape_ray.tasks.task import loaded, resolved
    from grape_ray.training.dry_run import dry_run
    from grape_ray.training.pricing import sampling_prob_of
    from grape_ray.training.splits import check_splits

    data = loaded(config.task, config.privacy.unit)
    config = replace(config, task=resolved(config.task, data))
    sampling_prob_of(config, data)
    check_splits(data, True, not data.public)
    with tempfile.TemporaryDirectory(prefix="grape-ray-") as scratch:
        return dry_run(config, data, Storage(scratch), 1.0, data.public).report
