"""Training a config to its end: in this process, or on Ray Train workers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from grape_ray.config.cautions import Consent
from grape_ray.config.schema import Config
from grape_ray.distributed.comms import Comms
from grape_ray.ray_backend.reachability import reach
from grape_ray.training import signals
from grape_ray.training.loop import Progress
from grape_ray.training.plan import Plan, prepare
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
    rehearse: bool = True,
    on_progress: Callable[[Progress, float | None], None] | None = None,
) -> dict[str, Any]:
    """Checks, prices and runs a config; the arguments are those of
    `grape_ray.training.plan.prepare`.

    Args:
        on_progress: told (progress, epsilon spent) as the run goes on.

    Returns:
        run, method, private (whether the method has a guarantee), epsilon and delta (the promise:
        of the whole study, because its tokens can still be spent), epsilon_spent (by the study's
        steps so far, for display), steps (that the model has taken), noise_multiplier, metrics
        (validation), seconds, peak_bytes (largest over processes), checkpoint and ledger (URLs);
        also metrics_step, problems (what failed without ending the run), diverged (metrics that
        ended it), exhausted, executed_steps (known to have been executed, repeats included),
        charged_steps, attempts, steps_per_s and workers. epsilon, epsilon_spent, delta,
        noise_multiplier and ledger are None for method `none`.

    Raises:
        GrapeRayError: one of its kinds for whatever is wrong.
    """
    plan = prepare(
        config, run=run, storage=storage, ledger=ledger, key_path=key_path,
        second_ledger=second_ledger, ledger_budget=ledger_budget, consent=consent,
        rehearse=rehearse, reach=partial(reach, config),
    )  # fmt: skip
    return run_plan(plan, on_progress)


def run_plan(
    plan: Plan, on_progress: Callable[[Progress, float | None], None] | None = None
) -> dict[str, Any]:
    """Runs or resumes what `prepare` checked; the result is that of `train`."""
    if plan.config.performance.num_workers == 0:
        with signals.listening():
            return execute(
                plan,
                Comms.local(),
                on_progress=on_progress,
                on_notice=lambda own: max(own, signals.told()),
            )
    # Ray takes seconds to import, and a run in this process does without it
    from grape_ray.ray_backend.trainer import fit

    return fit(plan, on_progress)
