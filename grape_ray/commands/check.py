"""``grape-ray check``: whether a model or pipeline can be trained privately, before anything is paid for."""

from __future__ import annotations

import dataclasses
import json
import time
from functools import partial

import click


@click.command("check")
@click.argument("model_or_pipeline")
@click.option("--method", "methods", multiple=True, help="Check this method; repeat for more. Default: the pipeline's own, or grape.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override a field, such as method.rank=8.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def command(model_or_pipeline: str, methods: tuple[str, ...], assignments: tuple[str, ...], as_json: bool) -> None:
    """Compare a few examples with separate backward passes, bound their norms, and see that every trainable tensor is noised.

    MODEL_OR_PIPELINE is a pipeline (pipelines.sst2, module:function, FILE.py), or a Hugging Face hub name or folder.
    """
    from grape_ray.preflight import preflight
    from grape_ray.withheld import told

    model, loss, batch, alone, config, public = _target(model_or_pipeline, assignments)
    reports = []
    for name in methods or (config.method.name,):
        began = time.perf_counter()
        method = config.override([f"method.name={name}"]).method
        report = told(partial(preflight, model, loss, batch, config.privacy, method, alone=alone), public)
        reports.append({**dataclasses.asdict(report), "seconds": round(time.perf_counter() - began, 3)})
        if not as_json:
            click.echo(
                f"{name}: {report.tensors} tensors ({report.projected} projected), {report.parameters:,} parameters noised as "
                f"{report.coordinates:,} numbers; largest difference from {report.examples} separate backward passes "
                f"{report.worst:.1e} ({report.worst_tensor})"
            )
    if as_json:
        click.echo(json.dumps({"target": model_or_pipeline, "ok": True, "reports": reports}))


def _target(reference: str, assignments: tuple[str, ...]):
    """(model, loss, batch, its examples alone, config, whether the records are public) of a pipeline, or of a model and a made-up batch."""
    from grape_ray.config import Config, Method
    from grape_ray.dryrun import extremes
    from grape_ray.errors import ConfigError
    from grape_ray.models.sample import sample
    from grape_ray.resolve import pipeline
    from grape_ray.task import loaded
    from grape_ray.withheld import told

    try:
        config = pipeline(reference)
    except ConfigError as missing:
        if ":" in reference or reference.startswith("pipelines.") or reference.endswith(".py"):
            raise
        try:
            model, loss, batch = sample(reference)
        except ConfigError as error:
            raise ConfigError("neither a pipeline nor a model", reference, str(missing), str(error)) from error
        return model, loss, batch, [], Config(task=None, method=Method(project_min_numel=4096)).override(assignments), True
    config = config.override(assignments)
    task = config.task
    data = loaded(task)
    model, batch, alone = told(partial(extremes, config, data), data.public)
    return model, task.per_example_loss, batch, alone, config, data.public
