"""``grape-ray train``: run a pipeline, privately and paid for."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from grape_ray.cli import options

if TYPE_CHECKING:  # for the command line, torch is imported only when a run begins
    from grape_ray.training.plan import Plan


@click.command("train")
@click.argument("pipeline")
@options.assignments(
    "a field, such as method.rank=8, or a parameter of the pipeline, such as size=tiny"
)
@click.option(
    "--workers",
    metavar="N|MIN:MAX",
    help="Ray Train workers; 0 trains in this process, 2:8 follows the cluster.",
)
@click.option(
    "--storage",
    default="runs",
    show_default=True,
    help="Folder or URL (s3://...) of runs and their checkpoints.",
)
@click.option(
    "--ledger",
    help="Folder or URL of the dataset's ledger; by default your own ledger of this dataset.",
)
@options.dataset_budget("the run's")
@click.option(
    "--not-private",
    is_flag=True,
    help="Let method none train on private data, without any guarantee.",
)
@click.option(
    "--run", "name", help="Name of the run; an existing one with the same config is resumed."
)
@click.option(
    "--key-file", help="Master key, made if missing; by default ~/.config/grape-ray/master.key."
)
@options.no_dry_run
@options.as_json
def command(
    pipeline, assignments, workers, storage, ledger, second_ledger, ledger_epsilon, ledger_delta,
    allow_large_delta, not_private, name, key_file, no_dry_run, as_json,
) -> None:  # fmt: skip
    """Train PIPELINE, a module such as pipelines.digits_vit, module:function, or a FILE.py.

    A dry run comes first: what could fail late fails before anything is paid for. Every step is
    charged to the ledger before its noise is drawn. Validation metrics are computed on data that
    counts as public.
    """
    from grape_ray.config.pipelines import pipeline as find_pipeline

    config = find_pipeline(pipeline, [*assignments, *worker_assignments(workers)])
    # From here on torch is needed, and its import takes seconds; a mistake in the command line was
    # refused before.
    from grape_ray.config.cautions import Consent
    from grape_ray.ray_backend.availability import check_workers
    from grape_ray.training.planning import plan_run
    from grape_ray.training.request import Payment, Places

    budget = ledger_budget(ledger_epsilon, ledger_delta)
    plan = plan_run(
        config,
        run=name,
        places=Places(storage, ledger, key_file),
        payment=Payment(budget, second_ledger, Consent(allow_large_delta, not_private)),
        with_dry_run=not no_dry_run,
        check_workers=check_workers,
    )
    run_and_report(plan, as_json)


def ledger_budget(epsilon: float | None, delta: float | None) -> tuple[float | None, float | None]:
    """What --ledger-epsilon and --ledger-delta say, checked. Raises ConfigError."""
    from grape_ray.accounting.mechanism import check_delta, check_epsilon

    return (
        None if epsilon is None else check_epsilon(epsilon, "--ledger-epsilon"),
        None if delta is None else check_delta(delta, "--ledger-delta"),
    )


def worker_assignments(workers: str | None) -> list[str]:
    """What --workers stands for."""
    return [] if workers is None else [f"performance.num_workers={workers}"]


def run_and_report(plan: Plan, as_json: bool) -> None:
    """Runs a plan, shows its progress on stderr and its result on stdout."""
    from grape_ray.cli.progress import Reporter, summary
    from grape_ray.ray_backend.train import run_plan
    from grape_ray.training.briefing import brief, lines

    briefing = brief(plan)
    with Reporter(sys.stderr, plan.config.privacy.steps) as reporter:
        for line in lines(briefing):
            reporter.say(line)
        result = run_plan(plan, reporter)
    for line in summary(result):
        click.echo(line)
    if as_json:
        click.echo(json.dumps({**result.as_dict(), "plan": briefing}))
