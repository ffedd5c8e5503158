"""The newest checkpoint of a run, evaluated again: what was trained privately may be looked at as
often as one likes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from grape_ray.config.description import read_run, rebuild_config
from grape_ray.errors import ConfigError
from grape_ray.privacy.redaction import run_redacted
from grape_ray.storage import Json, Storage
from grape_ray.tasks.metrics import plain
from grape_ray.tasks.task import loaded
from grape_ray.training.build import newest_checkpoint, trained_model
from grape_ray.training.private_scores import rebuilt
from grape_ray.training.result import RESULT_FILE, read_result
from grape_ray.training.splits import private_validation


def evaluate(run: str, trust: Iterable[str] = ()) -> Json:
    """The run's step and metrics; where the run has ended at that step, its result is brought up to
    date.

    Args:
        run: path or URL of the run's folder. trust: modules that its description may have imported,
            beside this project's own.

    Raises:
        CheckpointError: no run or no whole checkpoint there. ConfigError: its module is not
            trusted, or its validation records are private: each look at them is paid for, in
            training. TaskFailed: the evaluation failed again.
    """
    place = Storage(run)
    known = read_run(place)
    if rebuilt(known.get("validation")) is not None:
        fix = "train on, or begin a run whose validation records are public"
        raise ConfigError(
            "the run's validation records are private",
            run,
            "public ones: a score without noise would give them away",
            fix,
        )
    config = rebuild_config(known, trust)
    newest, data = newest_checkpoint(place), loaded(config.task, config.privacy.unit)
    if not data.validation_public:
        raise private_validation()
    model = run_redacted(partial(trained_model, config, newest), data.public)
    metrics = run_redacted(lambda: plain(config.task.evaluate(model, data.validation)), data.public)
    _update(place, newest.step, metrics)
    return {"run": known["run"], "step": newest.step, "metrics": metrics}


def _update(place: Storage, step: int, metrics: dict[str, float]) -> None:
    """Puts the metrics into the result of a run that ended at this step."""
    if not place.exists(RESULT_FILE):
        return
    result = read_result(place)
    if result.steps == step:
        replace(result, metrics=metrics, metrics_step=step).save(place)
