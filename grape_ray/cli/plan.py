"""``grape-ray plan``: what a step of each method takes, before there is a machine to take it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from grape_ray.cli import options
from grape_ray.storage import Json

if TYPE_CHECKING:
    from grape_ray.training.memory_plan import MemoryPlanner


@click.command("plan")
@click.argument("pipeline")
@options.assignments("a field, such as method.rank=64, or a parameter of the pipeline")
@click.option(
    "--method",
    "methods",
    multiple=True,
    help="Plan this method; repeat for more. Default: all of them, side by side.",
)
@click.option(
    "--gpu-memory-gb",
    "memory_gb",
    type=click.FloatRange(0, min_open=True),
    help="Memory of the device, in GB (10^9 bytes): says what fits, and the largest micro-batch.",
)
@click.option(
    "--device",
    default="h100",
    show_default=True,
    help="Whose data sheet bounds the seconds: h100, h200, a100, l4 or rtx4090.",
)
@options.as_json
def command(
    pipeline: str,
    assignments: tuple[str, ...],
    methods: tuple[str, ...],
    memory_gb: float | None,
    device: str,
    as_json: bool,
) -> None:
    """Memory and work of a step by method, from shapes alone: no weights, no data, no GPU.

    PIPELINE is as `train` takes it. Of a model its configuration is read (a folder with config.json
    is enough, or scratch:FAMILY?FIELD=VALUE); rows are as long as task.max_tokens. Counted is one
    worker that holds the whole model, and every tensor of the step; the library itself, which is
    some hundred MB on a GPU, and what an allocator wastes come on top. Milliseconds are what the
    device's arithmetic and memory need at least; they compare methods, and promise nothing.
    """
    from grape_ray.config.methods import METHODS
    from grape_ray.config.pipelines import pipeline as found
    from grape_ray.errors import ConfigError, nearest
    from grape_ray.training.memory_plan import MemoryPlanner
    from grape_ray.training.roofline import DEVICES

    if device not in DEVICES:
        raise ConfigError(
            "--device", device, "one of " + ", ".join(DEVICES), nearest(device, DEVICES)
        )
    config = found(pipeline, assignments)
    names = methods or tuple(METHODS)
    kernels = "cuda" if config.performance.use_gpu else "cpu"
    planner = MemoryPlanner(config, kernels, DEVICES[device])
    planned = {name: _planned(planner, name, memory_gb) for name in names}
    if not as_json:
        peak = max((found.get("peak_bytes", 0) for found in planned.values()), default=0)
        name, unit = ("GiB", 2**30) if peak >= 2**30 else ("MiB", 2**20)
        click.echo(f"a step over {config.performance.micro_batch_size} rows, {name} at its peak:")
        _show(planned, memory_gb, unit)
        return
    about = {
        "model": str(getattr(config.task, "model", config.task.name)),
        "methods": planned,
        "epsilon": config.privacy.epsilon,
        "delta": config.privacy.delta,
    }
    click.echo(json.dumps(about))


def _planned(planner: MemoryPlanner, method: str, memory_gb: float | None) -> Json:
    """The figures of a method; `error` in their place where it cannot train the model."""
    from grape_ray.errors import GrapeRayError

    try:
        plan = planner.plan(method)
    except GrapeRayError as error:
        return {"error": str(error)}
    memory = None if memory_gb is None else memory_gb * 1e9
    return {
        "peak_bytes": plan.peak_bytes,
        "by_category": dict(plan.by_category),
        "bytes_per_row": plan.bytes_per_row,
        "reduced_bytes": plan.reduced_bytes,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "operations": plan.operations,
        "seconds_at_least": plan.seconds,
        "fits": None if memory is None else plan.peak_bytes <= memory,
        "max_microbatch": None if memory is None else planner.max_microbatch(plan, memory),
    }


def _show(planned: Json, memory_gb: float | None, unit: int) -> None:
    from grape_ray.training.memory_plan import CATEGORIES

    head = ["method", "peak", *CATEGORIES, "a row", "reduced", "checkpoint", "10^12 ops", "ms"]
    if memory_gb is not None:
        head += [f"fits {memory_gb:g} GB", "rows that fit"]
    lines = [head]
    for name, found in planned.items():
        if "error" in found:
            lines.append([name, found["error"]])
            continue
        sizes = (
            found["peak_bytes"],
            *(found["by_category"].get(kind, 0) for kind in CATEGORIES),
            found["bytes_per_row"],
            found["reduced_bytes"],
            found["checkpoint_bytes"],
        )
        work = (found["operations"] / 1e12, found["seconds_at_least"] * 1e3)
        figures = (*(size / unit for size in sizes), *work)
        lines.append([name, *(f"{figure:.3g}" for figure in figures)])
        if memory_gb is not None:
            lines[-1] += ["yes" if found["fits"] else "no", str(found["max_microbatch"])]
    widths = [
        max(len(line[place]) for line in lines if len(line) == len(head))
        for place in range(len(head))
    ]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
