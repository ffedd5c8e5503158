"""``grape-ray bench``: time, memory and traffic of every method, beside the non-private loop and
the peers.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from grape_ray.cli.options import as_json, results_file
from grape_ray.storage import Json

if TYPE_CHECKING:
    from grape_ray.bench.models import Setting


@click.group("bench")
def command() -> None:
    """Measure; the results file is made by these commands alone."""


def _shape(function: Any) -> Any:
    """The options that choose a model and its shape."""
    for option in (
        click.option(
            "--model", default="encoder", show_default=True, help="A row of grape_ray.bench.models."
        ),
        click.option("--rows", type=int, help="Examples B in a batch."),
        click.option("--tokens", type=int, help="Positions T of a text."),
        click.option("--vocabulary", type=int, default=1000, show_default=True),
        click.option(
            "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True
        ),
        click.option("--bf16", is_flag=True, help="Run the loss under bf16 autocast."),
        click.option(
            "--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice."
        ),
        results_file,
        as_json,
    ):
        function = option(function)
    return function


def _setting(options: Json) -> Setting:
    from grape_ray.bench.models import setting

    return setting(
        **{
            k: options[k]
            for k in ("model", "rows", "tokens", "vocabulary", "device", "bf16", "threads")
        }
    )


def _finish(
    title: str,
    columns: Sequence[str],
    rows: list[list[str]],
    facts: Json,
    options: Json,
    note: str = "",
) -> None:
    """Prints the table, keeps it if asked to, and ends with the JSON line."""
    from grape_ray.bench import report

    body = report.table(columns, rows) + (f"\n\n{note}" if note else "")
    click.echo(body)
    if options["out"]:
        context = click.get_current_context()
        report.save(title, body, " ".join([context.command_path, *_words(context)]), options["out"])
    if options["as_json"]:
        click.echo(json.dumps(facts))


@command.command("methods")
@_shape
@click.option(
    "--methods", default="", help="Comma list of method or method:rank; by default all of them."
)
@click.option("--rounds", type=int, default=7, show_default=True)
@click.option(
    "--steps", type=int, default=1, show_default=True, help="Steps a candidate takes in a round."
)
def methods(methods: str, rounds: int, steps: int, **options: object) -> None:
    """Seconds a step and peak bytes above the model, in interleaved rounds, as ratios to `none`."""
    from grape_ray.bench.candidates import chosen
    from grape_ray.bench.measure import measure
    from grape_ray.bench.report import METHOD_COLUMNS, environment, method_rows

    where = _setting(options)
    found = measure(
        where,
        chosen([m for m in methods.split(",") if m]),
        rounds,
        steps,
        lambda text: click.echo(text, err=True),
    )
    rows = [row.to_json() for row in found]
    note = (
        "Seconds are CPU-seconds of the process, all threads."
        if where.device == "cpu"
        else "Seconds are of the synchronised GPU."
    )
    _finish(
        f"Methods: {where.title}",
        METHOD_COLUMNS,
        method_rows(rows),
        {"model": where.model, **environment(), "rows": rows},
        options,
        note,
    )


@command.command("profile")
@_shape
@click.option(
    "--methods",
    default="none,grape:16,bookkeeping,ghost",
    show_default=True,
    help="Comma list of method or method:rank.",
)
@click.option("--steps", type=int, default=3, show_default=True)
def profile(methods: str, steps: int, **options: object) -> None:
    """Where a step's seconds and bytes go."""
    from grape_ray.bench.candidates import chosen, label
    from grape_ray.bench.processes import Process
    from grape_ray.bench.report import environment

    where, facts = _setting(options), []
    for method, rank in chosen([m for m in methods.split(",") if m]):
        with Process(where, method, rank) as process:
            phases = process.ask("phases", steps)
        with Process(where, method, rank) as process:
            facts.append({"method": label(method, rank), **phases, **process.ask("bytes", 1)})
    rows = [[f"`{fact['method']}`", "error", fact["error"]] for fact in facts if "error" in fact]
    for fact in facts:
        rows += [
            [f"`{fact['method']}`", name, f"{seconds:.4f} s"]
            for name, seconds in fact.get("phases", {}).items()
            if seconds > 5e-5
        ]
        rows += [
            [f"`{fact['method']}`", name, f"{size / 2**20:.1f} MiB"]
            for name, size in fact.get("bytes", {}).items()
        ]
    _finish(
        f"Profile: {where.title}",
        ("method", "where", "a step"),
        rows,
        {"model": where.model, **environment(), "rows": facts},
        options,
    )


@command.command("length")
@_shape
@click.option(
    "--methods",
    default="none,ghost_gram,bookkeeping_gram,ghost,bookkeeping,randomized",
    show_default=True,
)
@click.option("--lengths", default="256,512,1024,2048,4096", show_default=True)
@click.option("--steps", type=int, default=1, show_default=True)
def length(methods: str, lengths: str, steps: int, **options: object) -> None:
    """Peak bytes and the seconds that norms take, against the number of tokens; ratios to `none` of
    the same length.
    """
    from grape_ray.bench.candidates import chosen, label
    from grape_ray.bench.processes import Process
    from grape_ray.bench.report import environment

    facts: list[Json] = []
    for tokens in _counts("--lengths", lengths):
        where, base = _setting({**options, "tokens": tokens}), None
        for method, rank in chosen(methods.split(",")):
            with Process(where, method, rank, for_memory=True) as process:
                peak = process.ask("memory", 2)
            with Process(where, method, rank) as process:
                norms = process.ask("phases", steps).get("phases", {}).get("norms")
            base = base or peak.get("peak_bytes")
            ratio = peak["peak_bytes"] / base if base and "peak_bytes" in peak else None
            facts.append(
                {
                    "tokens": tokens,
                    "method": label(method, rank),
                    "memory_ratio": ratio,
                    "norm_seconds": norms,
                    **peak,
                }
            )
            click.echo(json.dumps(facts[-1]), err=True)
    rows = [
        [
            str(f["tokens"]),
            f"`{f['method']}`",
            f"{f.get('peak_bytes', 0) / 2**20:.0f}",
            f"{f['memory_ratio'] or 0:.3f}",
            f"{f['norm_seconds'] or 0:.3f}",
        ]
        for f in facts
    ]
    facts_out = {"model": options["model"], **environment(), "rows": facts}
    _finish(
        f"Length: {options['model']}, T = {lengths}",
        ("T", "method", "peak MiB", "memory ratio", "norm s"),
        rows,
        facts_out,
        options,
    )


@command.command("comm")
@_shape
@click.option("--rank", type=int, default=16, show_default=True)
def comm(rank: int, **options: object) -> None:
    """Bytes that a rank sends a step, DP-GRAPE beside full-rank DP-Adam, on two real ranks."""
    from grape_ray.bench.comm import bytes_per_step

    where = _setting(options)
    sent = {method: bytes_per_step(where, method, rank) for method in ("grape", "dp_adam")}
    rows = [[f"`{m}`", f"{b:,}", f"{b / sent['dp_adam']:.4f}"] for m, b in sent.items()]
    facts = {"bytes_per_step": sent, "model": where.model, "rank": rank}
    _finish(
        f"Traffic: {where.model}, rank {rank}",
        ("method", "bytes a step", "ratio"),
        rows,
        facts,
        options,
    )


@command.command("checkpoint")
@_shape
@click.option(
    "--storage",
    help=(
        "Folder or URL to write to; by default an S3-compatible server on loopback, in a process of"
        " its own."
    ),
)
@click.option("--rank", type=int, default=12, show_default=True)
@click.option("--every", type=int, default=5, show_default=True, help="Steps between checkpoints.")
@click.option(
    "--deltas",
    type=int,
    default=20,
    show_default=True,
    help="Delta checkpoints between two full ones.",
)
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option(
    "--block",
    type=int,
    default=20,
    show_default=True,
    help="Steps of a block; blocks with and without checkpoints take turns.",
)
def checkpoint(
    storage: str | None,
    rank: int,
    every: int,
    deltas: int,
    rounds: int,
    block: int,
    **options: object,
) -> None:
    """Rate of steps with checkpoints over the rate without, in interleaved blocks of one run."""
    import contextlib
    import dataclasses

    from grape_ray.bench.checkpoint import measure, object_store
    from grape_ray.bench.report import environment

    where = _setting(options)
    with contextlib.nullcontext(storage) if storage else object_store() as url:
        found = measure(where, url, rank, every, deltas, rounds, block)
    rows = [
        [str(every), f"{found.without_s:.4f}", f"{found.with_s:.4f}", f"{found.rate:.3f}",
        f"{found.copy_s:.3f}", f"{found.full_bytes:,}",
         f"{found.delta_bytes:,}", f"{found.written} ({found.skipped})"]
    ]  # fmt: skip
    columns = (
        "every",
        "s/step without",
        "s/step with",
        "rate",
        "longest copy s",
        "full bytes",
        "delta bytes",
        "written (skipped)",
    )
    facts = {
        "model": where.model,
        "rank": rank,
        "every": every,
        "deltas": deltas,
        **environment(),
        **dataclasses.asdict(found),
    }
    note = (
        "The rate is the median over neighbouring blocks. A skipped checkpoint fell due while the"
        " upload of the one before was in flight."
    )
    _finish(
        f"Checkpoints: {where.title}, grape rank {rank}, {deltas} deltas a full one",
        columns,
        rows,
        facts,
        options,
        note,
    )


@command.command("scaling")
@_shape
@click.option("--rank", type=int, default=16, show_default=True)
def scaling(rank: int, **options: object) -> None:
    """CPU-seconds an example on one and two real ranks, each with its own batch."""
    from grape_ray.bench.report import environment
    from grape_ray.bench.scaling import weak

    where, rows = _setting(options), []
    facts = [
        {"method": m, "ranks": n, **weak(where, m, rank, n)}
        for m in ("grape", "dp_adam")
        for n in (1, 2)
    ]
    for fact in facts:
        base = next(f for f in facts if f["method"] == fact["method"])
        shown = [f"{fact[k]:.4f}" for k in ("cpu_s", "wall_s")]
        rows.append(
            [
                f"`{fact['method']}`",
                str(fact["ranks"]),
                *shown,
                f"{fact['cpu_s'] / base['cpu_s']:.3f}",
            ]
        )
    columns = ("method", "ranks", "CPU-s an example", "wall s an example", "CPU ratio to one rank")
    _finish(
        f"Weak scaling: {where.title}",
        columns,
        rows,
        {"model": where.model, **environment(), "rows": facts},
        options,
    )


@command.command("shell")
@click.option("--steps", type=int, default=150, show_default=True)
@click.option("--rounds", type=int, default=3, show_default=True)
@results_file
@as_json
def shell(steps: int, rounds: int, **options: object) -> None:
    """What the program, the loop and Ray add to a step and to a start, on the digits pipeline."""
    from grape_ray.bench.report import environment
    from grape_ray.bench.shell import help_s, runs

    found = {"help_s": help_s(), **runs("pipelines.digits_vit", steps, rounds)}
    rows = [
        ["`grape-ray --help`", f"{found['help_s']:.2f} s"],
        ["a step on one Ray worker / in this process", f"{found['step_ratio']:.3f}"],
        *(
            [f"start to first step and end, {w} workers", f"{s:.1f} s"]
            for w, s in found["start_s"].items()
        ),
    ]
    _finish(
        "Shell",
        ("what", "figure"),
        rows,
        {"model": "digits_vit", **environment(), **found},
        options,
    )


@command.command("ledger")
@click.option(
    "--entries",
    default="25000,50000,100000",
    show_default=True,
    help="Comma list of numbers of entries.",
)
@results_file
@as_json
def ledger(entries: str, **options: object) -> None:
    """CPU-seconds of opening and verifying a ledger in a local folder, against the number of its
    entries.
    """
    from grape_ray.bench.ledger import costs
    from grape_ray.bench.report import environment

    rows = [costs(count) for count in _counts("--entries", entries)]
    shown = [
        [f"{r['entries']:,}", *(f"{r[k]:.2f}" for k in ("open_s", "verify_s", "epsilon_spent_s"))]
        for r in rows
    ]
    columns = ("entries", "open, CPU-s", "verify, CPU-s", "epsilon spent, CPU-s")
    _finish(
        "Ledger: entries of one study, in a local folder",
        columns,
        shown,
        {**environment(), "rows": rows},
        options,
    )


@command.command("large")
@click.option("--model", default="opt-1.3b", show_default=True, help="opt-125m to opt-6.7b.")
@click.option("--method", default="grape", show_default=True)
@click.option("--rank", type=click.IntRange(1), default=64, show_default=True)
@click.option("--rows", type=click.IntRange(1), default=1, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=64, show_default=True)
@results_file
@as_json
def large(model: str, method: str, rank: int, rows: int, tokens: int, **options: object) -> None:
    """One private step of a large model on this CPU: resident peak, seconds, and the plan's bytes.

    The weights are random, in bfloat16, of the true shape; a step keeps each block's input alone.
    """
    from grape_ray.bench.large import Large, measured, planned
    from grape_ray.bench.report import environment

    case = Large(model, method, rank, rows, tokens)
    facts = {**dataclasses.asdict(case), **planned(case), **measured(case)}
    sizes = ("weights_bytes", "planned_bytes", "built_bytes", "peak_bytes", "library_bytes")
    parts = ("clipped_sum_s", "noise_s", "update_s")
    shown = [f"{facts[size] / 2**30:.2f}" for size in sizes] + [f"{facts[s]:.1f}" for s in parts]
    columns = (
        "weights GiB", "planned", "peak after building", "peak", "library", "sum s", "noise s",
        "update s",
    )  # fmt: skip
    shape = f"rank {rank}, B={rows}, T={tokens}, bf16 weights, recompute, cpu"
    _finish(
        f"Large: {model}, {method}, {shape}",
        columns,
        [shown],
        {**environment(), **facts},
        options,
        f"Loss {facts['loss']:.3f}; what was released has norm {facts['released_norm']:.1f}, its"
        f" noise alone {facts['noise_norm']:.1f}. The peak is of the whole process; planned are the"
        " tensors alone. Seconds are of the wall clock.",
    )


@command.command("random")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--count", type=click.IntRange(1024), default=1 << 24, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@results_file
@as_json
def random(device: str, count: int, rounds: int, **options: object) -> None:
    """Random numbers a second: noise, projections, the bits that round bfloat16 weights."""
    from grape_ray.bench.random_numbers import rates
    from grape_ray.bench.report import environment

    rows = rates(device, count, rounds)
    shown = [
        [r["kind"], str(r["threads"]), f"{r['per_s'] / 1e6:.0f}", f"{r['cost_ns']:.2f}"]
        for r in rows
    ]
    _finish(
        f"Random numbers on {device}, {count:,} at a time",
        ("numbers", "threads", "millions a second", "ns a number"),
        shown,
        {**environment(), "rows": rows},
        options,
        "The last column is CPU-seconds of all threads." if device == "cpu" else "",
    )


@command.command("study")
@click.argument("pipeline")
@click.option(
    "--vary", multiple=True, metavar="FIELD=A,B", help="A setting and its values; repeatable."
)
@click.option(
    "--case",
    "named",
    multiple=True,
    metavar="NAME: KEY=VALUE ..",
    help="Settings of several fields at once, such as a method with its own rate; repeatable.",
)
@click.option("--set", "words", multiple=True, metavar="KEY=VALUE", help="For every run.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--metric", default="accuracy", show_default=True, help="What the table compares.")
@click.option("--folder", required=True, help="Of the runs; a study that was cut off goes on.")
@click.option("--plot", default="", help="A file for a picture, such as study.svg.")
@click.option("--title", default="", help="Of the section in the results file.")
@results_file
@as_json
def study(
    pipeline: str,
    vary: tuple[str, ...],
    named: tuple[str, ...],
    words: tuple[str, ...],
    seeds: int,
    metric: str,
    folder: str,
    plot: str,
    title: str,
    **options: object,
) -> None:
    """Train PIPELINE with every combination of settings, over seeds, on public data: mean and
    spread of a metric, CPU-seconds and peak bytes of whole processes.
    """
    from dataclasses import asdict
    from pathlib import Path

    from grape_ray.bench.report import environment
    from grape_ray.bench.study import CASE, summary
    from grape_ray.bench.study import study as runs_of
    from grape_ray.bench.study_plot import draw

    settings = _named(named)
    varied = ({CASE: list(settings)} if settings else {}) | _varied(vary)
    tell = partial(click.echo, err=True)
    runs = list(runs_of(pipeline, varied, seeds, words, Path(folder), tell, settings))
    columns, rows = summary(runs, varied, metric)
    if plot and varied:
        draw(runs, varied, metric, Path(plot))
    facts = {**environment(), "runs": [asdict(run) for run in runs]}
    _finish(title or f"Study: {pipeline}", columns, rows, facts, options)


@command.command("levers")
@click.argument("pipeline")
@click.option("--set", "words", multiple=True, metavar="KEY=VALUE", help="As `train` takes it.")
@click.option("--steps", type=click.IntRange(1), default=120, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=256, show_default=True)
@click.option("--seeds", type=click.IntRange(3), default=8, show_default=True)
@results_file
@as_json
def levers(
    pipeline: str, words: tuple[str, ...], steps: int, batch: int, seeds: int, **options: object
) -> None:
    """What each choice buys on the PUBLIC texts of PIPELINE's task, with its standard error: a
    small network on frozen embeddings, at the pipeline's epsilon and delta.
    """
    from dataclasses import asdict

    import torch

    from grape_ray.bench.levers import Setting, effects, embedded
    from grape_ray.bench.report import environment
    from grape_ray.config.pipelines import pipeline as config_of
    from grape_ray.errors import ConfigError
    from grape_ray.tasks.text_classification import TextClassification

    config = config_of(pipeline, words)
    if not isinstance(config.task, TextClassification):
        kind = type(config.task).__name__
        raise ConfigError("the task of bench levers", kind, "a TextClassification")
    torch.set_num_threads(1)  # products this small cost more to share than to do
    setting = Setting(config.privacy.epsilon, config.privacy.delta, batch, steps)
    rows, facts = [], []
    for one in effects(embedded(config.task), setting, seeds):
        click.echo(f"{one.name}: {one.accuracy:.4f}", err=True)
        facts.append(asdict(one))
        rows.append([
            one.name, f"{one.rate:g}", f"{one.accuracy:.4f}", f"{one.deviation:.4f}",
            f"{100 * one.difference:+.2f}", f"{100 * one.error:.2f}",
        ])  # fmt: skip
    columns = ("choice", "rate", "accuracy", "deviation", "points over the first", "standard error")
    about = f"epsilon {setting.epsilon:g}, {steps} steps of {batch}, {seeds} seeds"
    _finish(f"Levers: {about}", columns, rows, {**environment(), "rows": facts}, options)


def _varied(texts: Sequence[str]) -> dict[str, list[str]]:
    """`--vary` as field -> values."""
    from grape_ray.errors import ConfigError

    found = {}
    for text in texts:
        name, _, values = text.partition("=")
        if not name or not all(values.split(",")):
            fix = "such as --vary method.rank=4,16"
            raise ConfigError("--vary", text, "FIELD=VALUE,VALUE", fix)
        found[name] = values.split(",")
    return found


def _named(texts: Sequence[str]) -> dict[str, list[str]]:
    """`--case` as name -> `key=value` texts."""
    from grape_ray.errors import ConfigError

    found = {}
    for text in texts:
        name, _, settings = text.partition(":")
        words = settings.split()
        if not name or not words or name in found:
            fix = 'such as --case "grape: method.name=grape method.learning_rate=5e-3"'
            raise ConfigError("--case", text, "NAME: KEY=VALUE .., each name once", fix)
        found[name] = words
    return found


def _words(context: click.Context) -> list[str]:
    """What a command was given, less where its results go."""
    found = []
    for param in context.command.params:
        value = context.params[param.name or ""]
        if param.name in ("out", "as_json", "folder", "title", "plot") or value in (None, False, 0):
            continue
        for one in value if isinstance(value, tuple) else [value]:
            if one != "":
                word = shlex.quote(str(one))
                given = param.param_type_name == "argument"
                found.append(word if given else f"{param.opts[0]} {word}")
    return found


def _counts(option: str, text: str) -> list[int]:
    """A comma list of whole numbers."""
    from grape_ray.errors import ConfigError

    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ConfigError(option, text, "a comma list of integers", f"such as {option} 256,512")
    return [int(word) for word in words]
