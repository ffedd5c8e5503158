"""Ray Tune's search algorithm and scheduler of a sweep: who proposes trials and who stops them."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher
from ray.tune.search.sample import Categorical, Domain, Float, Integer

from grape_ray.errors import ConfigError
from grape_ray.tuning.options import Options
from grape_ray.tuning.spaces import CONTINUABLE, Space, SweepStudy, check_methods


def check(options: Options, space: Space, study: SweepStudy) -> None:
    """Refuses what Ray Tune could not sample, propose or schedule. Raises ConfigError."""
    check_domains(space, study)
    scheduler(options, space, study)
    search(options, space, study, 1)


def check_domains(space: Space, study: SweepStudy) -> None:
    """Refuses what Ray Tune could not sample, and methods of another mechanism. Raises
    ConfigError.
    """
    for name, domain in space.items():
        if not isinstance(domain, Domain):
            got = "grid_search" if isinstance(domain, dict) else type(domain).__name__
            raise ConfigError(
                f"the domain of {name}",
                got,
                "a domain of ray.tune, such as tune.choice([4, 8])",
                "a grid is no distribution",
            )
        # the methods of a sweep must share one mechanism, so all of them must be known
        if name == "method.name" and not isinstance(domain, Categorical):
            raise ConfigError(
                "the domain of method.name",
                type(domain).__name__,
                "tune.choice of methods",
                "name them",
            )
    if "method.name" in space:
        check_methods(study.config.method.name, space["method.name"].categories)
    for name in space:  # a value of a wrong type or range is refused now, not by the first trial
        study.with_values({name: space[name].sample()})


def scheduler(options: Options, space: Space, study: SweepStudy) -> TrialScheduler:
    """Who stops trials, or continues one from another's checkpoint. Raises ConfigError for a space
    in which it has nothing to do.
    """
    kind = options.scheduler
    every, steps = study.config.performance.eval_every, study.config.privacy.steps
    if kind == "asha":
        return ASHAScheduler(
            time_attr="step",
            max_t=steps,
            grace_period=every,
            reduction_factor=study.reduction_factor,
        )
    if kind == "median":
        return MedianStoppingRule(time_attr="step", grace_period=every, min_samples_required=3)
    if kind == "none":
        return FIFOScheduler()
    mutable = {name: domain for name, domain in space.items() if name in CONTINUABLE}
    if not mutable:
        expected = "a space that varies one of " + ", ".join(CONTINUABLE)
        raise ConfigError(
            "population-based training has nothing to vary",
            ", ".join(space),
            expected,
            "use another --scheduler",
        )
    return PopulationBasedTraining(
        time_attr="step", perturbation_interval=every, hyperparam_mutations=mutable
    )


def search(
    options: Options, space: Space, study: SweepStudy, concurrent: int
) -> SearchAlgorithm | Searcher:
    """The proposals, beginning with the default run where it lies in the space: a sweep should not
    end below it unawares.

    Raises:
        ConfigError: what proposes is not installed.
    """
    defaults = study.defaults(space)
    first = (
        [defaults]
        if all(_holds(domain, defaults[name]) for name, domain in space.items())
        else None
    )
    if options.search == "random":
        return BasicVariantGenerator(
            points_to_evaluate=first, max_concurrent=concurrent, random_state=options.seed
        )
    try:
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(points_to_evaluate=first, seed=options.seed)
    except (ImportError, AssertionError) as error:
        raise ConfigError(
            "--search optuna",
            "Optuna is not installed",
            "an installed optuna",
            "pip install optuna",
        ) from error


def _holds(domain: Domain, value: Any) -> bool:
    """Whether a domain could have given the value."""
    if isinstance(domain, Categorical):
        return value in domain.categories
    if isinstance(domain, (Float, Integer)):
        return bool(domain.lower <= value <= domain.upper)
    return False
