"""Training a config to its end: in this process, or on Ray Train workers."""

from __future__ import annotations

from collections.abc import Callable

from grape_ray.config.cautions import Consent
from grape_ray.config.schema import Config
from grape_ray.distributed.comms import Comms
from grape_ray.ray_backend.availability import check_workers
from grape_ray.training import signals
from grape_ray.training.callbacks import RunCallbacks
from grape_ray.training.plan import Plan
from grape_ray.training.planning import plan_run
from grape_ray.training.progress import Progress
from grape_ray.training.request import Payment, Places
from grape_ray.training.result import RunResult
from grape_ray.training.run import execute


def train(
    config: Config,
    *,
    run: str | None = None,
    storage: str = "runs",
    ledger: str | None = None,
    key_path: str | None = None,
    second_ledger: bool = False,
    ledger_budget: tuple[float | None, float | None] = (None, None),
    consent: Consent = Consent(),  # noqa: B008  (frozen)
    with_dry_run: bool = True,
    on_progress: Callable[[Progress, float | None], None] | None = None,
) -> RunResult:
    """Checks, prices and runs a config; the arguments are those of
    `grape_ray.training.planning.plan_run`, with the fields of its `Places` and `Payment`.

    Args:
        on_progress: see RunCallbacks.

    Raises:
        GrapeRayError: one of its kinds for whatever is wrong.
    """
    plan = plan_run(
        config,
        run=run,
        places=Places(storage, ledger, key_path),
        payment=Payment(ledger_budget, second_ledger, consent),
        with_dry_run=with_dry_run,
        check_workers=check_workers,
    )
    return run_plan(plan, on_progress)


def run_plan(
    plan: Plan, on_progress: Callable[[Progress, float | None], None] | None = None
) -> RunResult:
    """Runs or resumes what `plan_run` or `plan_resume` checked; the result is that of `train`."""
    if plan.config.performance.num_workers == 0:
        with signals.installed():
            callbacks = RunCallbacks(
                on_progress=on_progress, agree_on_signal=lambda own: max(own, signals.received())
            )
            return execute(plan, Comms.local(), callbacks)
    # Ray takes seconds to import, and a run in this process does without it
    from grape_ray.ray_backend.trainer import fit

    return fit(plan, on_progress)
