"""``grape-ray resume``: resume a run that was cut off."""

from __future__ import annotations

import click

from grape_ray.cli import options


@click.command("resume")
@click.argument("run")
@click.option("--ledger", help="Where the dataset's ledger lies now, if it was moved.")
@click.option(
    "--second-ledger",
    is_flag=True,
    help="Let the ledger differ from the one that is known for these records.",
)
@click.option(
    "--workers", metavar="N|MIN:MAX", help="Ray Train workers, if another number than before."
)
@options.assignments("a performance.* field")
@click.option("--key-file", help="Master key; by default ~/.config/grape-ray/master.key.")
@options.trust_module
@options.no_dry_run
@options.as_json
def command(
    run, ledger, second_ledger, workers, assignments, key_file, trust, no_dry_run, as_json
) -> None:
    """Resume RUN (a run's folder or URL) from its newest whole checkpoint, as a new attempt
    with keys of its own.

    Steps after that checkpoint are taken again, and paid for again: plan privacy.spare_steps for
    them. How many they are, what they cost and where the budget will end is said before the first
    of them.
    """
    from grape_ray.cli.train import run_and_report, worker_assignments
    from grape_ray.errors import ConfigError
    from grape_ray.ray_backend.availability import check_workers
    from grape_ray.training.resume import plan_resume

    for text in assignments:
        if not text.strip().startswith("performance."):
            raise ConfigError(
                "--set of a resumed run",
                text,
                "performance.KEY=VALUE",
                "give a run with other settings a name of its own",
            )
    changes = [*assignments, *worker_assignments(workers)]
    plan = plan_resume(
        run, ledger=ledger, key_path=key_file, second_ledger=second_ledger, assignments=changes,
        trust=trust, with_dry_run=not no_dry_run, check_workers=check_workers,
    )  # fmt: skip
    run_and_report(plan, as_json)
