"""A sweep in mode compose: Ray Tune proposes and stops trials, and every step that any of them
takes is paid for from one study.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import ray
from ray import tune

from grape_ray.errors import ConfigError, GrapeRayError
from grape_ray.ledger.entries import Study
from grape_ray.privacy.redaction import text_of
from grape_ray.ray_backend.ledger_client import open_ledgers
from grape_ray.ray_backend.old_homes import old_homes
from grape_ray.ray_backend.searcher import scheduler, search
from grape_ray.ray_backend.trainable import WORST, Trial, TrialSettings
from grape_ray.storage import Json
from grape_ray.tuning import results
from grape_ray.tuning.folder import RUNS, TUNE
from grape_ray.tuning.options import Options
from grape_ray.tuning.results import SweepResult
from grape_ray.tuning.spaces import SweepStudy
from grape_ray.tuning.sweep import Sweep

_HEAD = "node:__internal_head__"
_MAX_FAILURES = 3
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    # a driver that is killed forgets no more than so many seconds
    "TUNE_GLOBAL_CHECKPOINT_S": "3",
}


def compose(sweep: Sweep, concurrent: int, say: Callable[[str], None]) -> SweepResult:
    """Runs or resumes a sweep on the connected cluster, so many trials at a time.

    Raises:
        GrapeRayError: the ledger refuses the study, is held by another cluster, or cannot be
            reached.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # it would tell of every trial again, in its own words
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    with open_ledgers(sweep) as (ledger, score_ledger):
        paid = sweep.steps.paid
        assert isinstance(paid, Study)
        runs = f"{sweep.folder().url}/{RUNS}"
        settings = TrialSettings(
            sweep.study,
            paid,
            runs,
            sweep.steps.ledger,
            sweep.options.key_path,
            ledger,
            score_ledger,
            sweep.terms(),
        )
        say(
            f"sweep {sweep.name} in {sweep.storage}: {paid.tokens} step tokens, noise multiplier"
            f" {paid.mechanism.noise_multiplier:.4g}"
        )
        TrialProgress.say = staticmethod(say)
        _check(_tuner(sweep, settings, concurrent).fit(), say)
    result = results.composed(sweep)
    results.save(sweep.folder(), result)
    return result


def concurrency(study: SweepStudy, options: Options) -> int:
    """Trials at a time, such that each finds the processes it needs and none waits for another that
    waits for it.

    A trial without workers takes one CPU (or GPU). One with workers is a driver that costs nothing,
    and its workers take one each.

    Raises:
        ConfigError: not even one trial fits into the cluster.
    """
    performance, resources = study.config.performance, ray.cluster_resources()
    unit = "GPU" if performance.use_gpu else "CPU"
    there, each = int(resources.get(unit, 0)), max(1, performance.workers[1])
    if there < each:
        what = "the cluster is too small for one trial"
        raise ConfigError(
            what, f"{there} {unit}s", f"at least {each}", "lower --workers, or enlarge the cluster"
        )
    return min(there // each, options.trials, options.concurrent or options.trials)


def _check(trials: tune.ResultGrid, say: Callable[[str], None]) -> None:
    """Tells why trials failed. Raises the first one's error where all did: then it is likely one
    thing that kept them.
    """
    errors = [getattr(error, "cause", error) for error in trials.errors]
    for error in errors:
        say(f"a trial failed: {' '.join(text_of(error).split())[:300]}")
    if errors and len(errors) == len(trials):
        if isinstance(errors[0], GrapeRayError):
            raise errors[0]
        raise GrapeRayError(
            "every trial failed",
            type(errors[0]).__name__,
            "trials that end",
            "see the lines above, then continue with --resume",
        )


def _tuner(sweep: Sweep, settings: TrialSettings, concurrent: int) -> tune.Tuner:
    """The tuner, new or as it was when it was killed."""
    performance, options = sweep.study.config.performance, sweep.options
    # With workers the trial itself only launches and watches, on the head node; a whole CPU for it
    # would starve its own workers.
    need: dict[str, float] = (
        {_HEAD: 0.001} if performance.num_workers else {"GPU" if performance.use_gpu else "CPU": 1}
    )
    trainable = tune.with_resources(tune.with_parameters(Trial, settings=settings), need)
    path = f"{sweep.folder().url}/{TUNE}"
    if sweep.existing and tune.Tuner.can_restore(path):
        with old_homes(_Teller=TrialProgress):
            return tune.Tuner.restore(
                path, trainable=trainable, resume_unfinished=True, resume_errored=True
            )
    return tune.Tuner(
        trainable,
        param_space=sweep.space,
        tune_config=tune.TuneConfig(
            metric=sweep.study.metric,
            mode="max",
            num_samples=options.trials,
            # random search has a limit of its own
            max_concurrent_trials=concurrent if options.search == "optuna" else None,
            search_alg=search(options, sweep.space, sweep.study, concurrent),
            scheduler=scheduler(options, sweep.space, sweep.study),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=sweep.folder().url,
            failure_config=tune.FailureConfig(max_failures=_MAX_FAILURES),
            callbacks=[TrialProgress(sweep.study.metric)],
            verbose=0,
        ),
    )


class TrialProgress(tune.Callback):
    """Says one line a report.

    Ray Tune pickles its callbacks with the sweep's state, and a stream cannot be pickled: `say` is
    therefore an attribute of the class, set by each process that runs the sweep.
    """

    say: Callable[[str], None] = staticmethod(lambda text: None)

    def __init__(self, metric: str):
        self._metric = metric

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Json, **info: object
    ) -> None:
        score = result[self._metric]
        TrialProgress.say(
            f"trial {trial.trial_id}  step {result['step']}  {self._metric}"
            f" {f'{score:.4f}' if score > WORST else 'not finite'}"
        )
