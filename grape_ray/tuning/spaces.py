"""A tune space: the base run of a sweep, which of its fields may vary, and where its score comes
from.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from grape_ray.config.methods import METHODS
from grape_ray.config.modules import call, load_module
from grape_ray.config.parameters import taken
from grape_ray.config.pipelines import FIELDS
from grape_ray.config.schema import Config
from grape_ray.errors import ConfigError, nearest
from grape_ray.storage import Json
from grape_ray.training.private_scores import check_metric

PUBLIC, PRIVATE = "public", "private"
_RETURNS = "space() -> a dict of domains, not empty, and study() -> SweepStudy"
_LIKE = "see tune_spaces/digits.py for one"

# Fields that no trial may vary, each with the reason that the error gives.
FROZEN = {
    "privacy.epsilon": "it is the study's share of the budget",
    "privacy.delta": "it is the study's share of the budget",
    "privacy.expected_batch_size": "it changes the sampling probability, which the study freezes",
    "privacy.noise_multiplier": "the study freezes it",
    "privacy.spare_steps": "the study's tokens are shared by all trials",
    "privacy.probes": "it changes the mechanism, which the study freezes",
    "privacy.shared_probes": "it changes the mechanism, which the study freezes",
    "privacy.unit": "it changes what the study's budget protects",
}
# What a checkpoint can be continued with: changing anything else would not fit its moments or its
# model.
CONTINUABLE = (
    "method.learning_rate",
    "method.weight_decay",
    "method.momentum",
    "privacy.clip_norm",
    "privacy.clipping",
)

Space = dict[str, Any]  # a field of the config -> a domain of Ray Tune's, or a value


@dataclass(frozen=True)
class SweepStudy:
    """What the trials of a sweep have in common.

    Attributes:
        config: the default run; its privacy.epsilon and delta are the sweep's unless it is
            given others, privacy.steps those of a full trial; trials are compared every
            performance.eval_every steps.
        tunable: names of the fields that the space may vary, such as `method.rank`.
        score_source: `public`: the task's validation records are public, and metrics on them are
            free; `private`: they are not, so the score alone is released, noised and charged to the
            validation records' own ledger. There is no default.
        metric: the validation metric that is compared; higher is better. A private one must be
            among the task's `bounded_metrics`: the noise covers a mean over the validation records
            of a value in [0, 1], such as accuracy.
        score_epsilon, score_delta: what all private scores of the sweep may cost the validation
            records; unused if public.
        reduction_factor: `asha` keeps one trial in so many at each rung; the first rung is
            performance.eval_every.
    """

    config: Config
    tunable: tuple[str, ...]
    score_source: str
    metric: str = "accuracy"
    score_epsilon: float = 1.0
    score_delta: float = 1e-5
    reduction_factor: int = 3

    def __post_init__(self) -> None:
        if self.score_source not in (PUBLIC, PRIVATE):
            expected = (
                "'public' (a public validation set) or 'private' (then it is noised and charged)"
            )
            raise ConfigError(
                "score_source", self.score_source, expected, "say where the score comes from"
            )
        if self.score_source == PRIVATE:
            check_metric(self.config.task, self.metric, self.config.privacy.unit)
        if self.reduction_factor < 2:
            raise ConfigError(
                "reduction_factor", self.reduction_factor, "an integer >= 2", "3 is usual"
            )
        if not METHODS[self.config.method.name].private:
            raise ConfigError(
                "method.name of a tune space",
                self.config.method.name,
                "a private method",
                "the non-private baseline is not for sweeps",
            )
        check_names(self.tunable, self.tunable)

    def with_values(self, values: Json) -> Config:
        """The config of a trial. Raises ConfigError for a value that its field does not take."""
        return self.config.override(f"{name}={_text(value)}" for name, value in values.items())

    def defaults(self, names: Iterable[str]) -> Json:
        """The default run's own values of these fields."""
        found = {}
        for name in names:
            value: object = self.config
            for part in name.split("."):
                if not hasattr(value, part):
                    raise ConfigError(
                        "a tune space varies what is no field",
                        name,
                        "fields of grape_ray.Config",
                        "correct its name",
                    )
                value = getattr(value, part)
            found[name] = value
        return found

    def check_rungs(self) -> None:
        """Refuses a study whose trials are never compared. Raises ConfigError."""
        every, steps = self.config.performance.eval_every, self.config.privacy.steps
        if not 0 < every <= steps:
            raise ConfigError(
                "performance.eval_every of a tune space",
                every,
                f"1 to {steps}",
                "trials are compared at evaluations",
            )


def check_names(names: Iterable[str], tunable: Iterable[str]) -> None:
    """Refuses, by name, what a sweep may not vary. Raises ConfigError."""
    tunable = tuple(tunable)
    for name in names:
        if name in FROZEN:
            raise ConfigError(
                f"a sweep cannot vary {name}: {FROZEN[name]}",
                None,
                ", ".join(tunable),
                "take it out of the space",
            )
        if name.startswith("performance."):
            fix = "set it once for the whole sweep"
            raise ConfigError(
                f"a sweep cannot vary {name}: it changes speed and no result",
                None,
                ", ".join(tunable),
                fix,
            )
        if name not in tunable:
            raise ConfigError(
                "the study lets no trial vary this field",
                name,
                nearest(name, tunable),
                "take it out of the space",
            )


def check_methods(base: str, names: Iterable[str]) -> None:
    """Refuses methods whose steps are not the base method's mechanism. Raises ConfigError."""
    for name in names:
        if name not in METHODS:
            raise ConfigError(
                "method.name", name, "one of " + ", ".join(METHODS), nearest(name, METHODS)
            )
        if not METHODS[name].private or METHODS[name].exact != METHODS[base].exact:
            same = [
                m
                for m, info in METHODS.items()
                if info.private and info.exact == METHODS[base].exact
            ]
            raise ConfigError(
                "a sweep cannot mix mechanisms: method.name",
                name,
                "one of " + ", ".join(same),
                "run another sweep for it",
            )


def load(reference: str, assignments: Iterable[str] = ()) -> tuple[Space, SweepStudy]:
    """(Domains by field name, study) of a module such as `tune_spaces.digits`.

    Args:
        assignments: `key=value` texts: parameters of `study`, such as `size=tiny`, which `space`
            gets as far as it has them, and overrides of the study's default run.

    Raises:
        ConfigError: no such module, it lacks `space` or `study`, or it varies what no sweep may.
    """
    from dataclasses import replace

    module = load_module(reference, reference, "tune space")
    for name in ("space", "study"):
        if not callable(getattr(module, name, None)):
            raise ConfigError(
                f"tune space {reference} has no function {name}()", None, _RETURNS, _LIKE
            )
    arguments, assignments = taken(module.study, assignments, FIELDS)
    shared = {n: v for n, v in arguments.items() if n in inspect.signature(module.space).parameters}
    space, study = (
        call(function, f"tune space {reference}", _RETURNS)
        for function in (partial(module.space, **shared), partial(module.study, **arguments))
    )
    if not isinstance(space, dict) or not space or not isinstance(study, SweepStudy):
        got = f"{type(space).__name__} and {type(study).__name__}"
        raise ConfigError(f"tune space {reference}", got, _RETURNS, _LIKE)
    check_names(space, study.tunable)
    study.defaults(space)
    study = replace(study, config=study.config.override(assignments))
    study.check_rungs()
    return space, study


def _text(value: object) -> str:
    """A value as `Config.override` reads it."""
    value = getattr(value, "item", lambda: value)()
    if isinstance(value, str):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value)
