"""``grape-ray tune``: sweep a tune space under one privacy budget."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from grape_ray.cli import options as cli_options
from grape_ray.config.modules import located
from grape_ray.errors import ConfigError
from grape_ray.storage import Json
from grape_ray.tuning.options import COMPOSE, DISTRIBUTIONS, SCHEDULERS, SEARCHES, SELECT, Options

if TYPE_CHECKING:  # importing it takes seconds that --help does not have
    from grape_ray.tuning.results import SweepResult


@click.command("tune")
@click.argument("space")
@click.option(
    "--budget-epsilon",
    "epsilon",
    type=float,
    help="What the whole sweep may cost; by default the space's epsilon.",
)
@click.option("--budget-delta", "delta", type=float, help="Its delta; by default the space's.")
@click.option(
    "--trials",
    type=int,
    default=10,
    show_default=True,
    help="Trials; with --mode select the mean of their secret number.",
)
@click.option(
    "--scheduler",
    type=click.Choice(SCHEDULERS),
    help="Who stops trials.  [default: asha; none with --mode select]",
)
@click.option(
    "--search",
    type=click.Choice(SEARCHES),
    default="random",
    show_default=True,
    help="Who suggests trials.",
)
@click.option("--seed", type=int, help="Seed of the search.")
@click.option(
    "--mode",
    type=click.Choice([COMPOSE, SELECT]),
    default=COMPOSE,
    show_default=True,
    help="Pay for every step of every trial, or for the release of the winner alone.",
)
@click.option(
    "--distribution",
    "--law",
    "law",
    type=click.Choice(list(DISTRIBUTIONS)),
    default="logarithmic",
    show_default=True,
    help="Of the secret number of trials.",
)
@click.option(
    "--tokens",
    type=int,
    help="Step tokens of the sweep; by default what the scheduler is expected to use.",
)
@click.option(
    "--storage", default="sweeps", show_default=True, help="Folder or URL (s3://...) of sweeps."
)
@click.option(
    "--ledger",
    help="Folder or URL of the dataset's ledger; by default your own ledger of this dataset.",
)
@click.option("--score-ledger", help="The same for private validation records.")
@cli_options.dataset_budget("the sweep's")
@click.option(
    "--workers", type=int, help="Ray Train workers a trial; 0 trains in the trial's own process."
)
@click.option("--concurrent", type=int, help="Trials at a time; by default as many as fit.")
@cli_options.assignments("a field of the default run, or a parameter of the space's study()")
@click.option(
    "--key-file",
    "key_path",
    help="Master key, made if missing; by default ~/.config/grape-ray/master.key.",
)
@click.option("--sealed", help="Folder for the secrets of --mode select; by default your own.")
@click.option("--name", help="Name of the new sweep.")
@click.option("--resume", metavar="NAME", help="Resume a sweep that was cut off.")
@click.option(
    "--trust-state",
    is_flag=True,
    help="Load Ray Tune's state (pickles) also of a sweep that was not begun from here.",
)
@cli_options.as_json
@click.pass_context
def command(
    context: click.Context,
    workers: int | None,
    name: str | None,
    resume: str | None,
    trust_state: bool,
    as_json: bool,
    **words: Any,
) -> None:
    """Tune SPACE, a module such as tune_spaces.digits, or a FILE.py, with space() and study().

    Every step of every trial is charged to one study before its noise is drawn, so the epsilon of
    the winner is that of the sweep.
    """
    words["assignments"] = (
        *words["assignments"],
        *([] if workers is None else [f"performance.num_workers={workers}"]),
    )
    words["scheduler"] = words["scheduler"] or ("none" if words["mode"] == SELECT else "asha")
    words["space"] = located(words["space"], "tune space")
    say = partial(click.echo, err=True)
    if resume is None:
        options = Options(**words)
        from grape_ray.ray_backend.sweep import run

        result = run(options, say, name)
    else:
        if name not in (None, resume):
            raise ConfigError(
                "--name with --resume", name, f"{resume}, or nothing", "a sweep keeps its name"
            )
        from grape_ray.ray_backend.sweep import resume as resume_sweep

        given = _given(context, words, workers)
        result = resume_sweep(words["storage"], resume, given, say, trust_state=trust_state)
    for line in _summary(result):
        click.echo(line)
    if as_json:
        click.echo(json.dumps(result.as_json()))


def _given(context: click.Context, words: Json, workers: int | None) -> Json:
    """The options that were written on the command line, but for where the sweep lies."""
    given = {
        name: value
        for name, value in words.items()
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    }
    given |= {"space": words["space"]} | (
        {"assignments": words["assignments"]} if workers is not None else {}
    )
    return {name: value for name, value in given.items() if name != "storage"}


def _summary(result: SweepResult) -> list[str]:
    """The result in lines for a person."""
    best = result.best
    lines = [
        f"sweep {result.sweep}: epsilon {result.epsilon:g} at delta {result.delta:g} for one"
        f" {result.unit}, for all of it"
    ]
    if result.tokens_total is not None:
        tokens = f"{result.tokens_charged} of {result.tokens_total} step tokens charged"
        lines.append(f"{result.trials} trials, {tokens}, {result.steps_executed} steps executed")
    if best is None:
        return [
            *lines,
            "no trial has a finite score, so none is the best: look at the metric and at the"
            " learning rates of the space",
        ]
    values = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in best.config.items()
    )
    lines.append(f"best: score {best.score:.4f} after {best.steps} steps with {values}")
    if best.naive_epsilon is not None:
        lines.append(
            f"its own steps alone would cost epsilon {best.naive_epsilon:.3f}: that is not what"
            " tuning costs"
        )
    return [*lines, f"ledger {result.ledger}; run {best.run}"]
