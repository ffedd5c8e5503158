"""What a run's steps cost: their mechanism, its noise, and how many of them the budget buys."""

from __future__ import annotations

from dataclasses import asdict

from grape_ray.accounting import calibration
from grape_ray.accounting.mechanism import GAUSSIAN, RANDOMIZED, Mechanism
from grape_ray.config.methods import METHODS
from grape_ray.config.schema import Config
from grape_ray.errors import BudgetExceeded, ConfigError, DataError
from grape_ray.ledger.entries import Study
from grape_ray.storage import Json
from grape_ray.tasks.task import Data


def sampling_prob_of(config: Config, data: Data) -> float:
    """expected_batch_size over the number of privacy units, if that is a probability."""
    for split in ("train", "validation"):
        if len(getattr(data, split)) == 0 and (split == "train" or data.validation_public):
            raise DataError(
                f"the {split} split is empty", 0, "at least one record", "check the data"
            )
    size, units = config.privacy.expected_batch_size, data.unit_count
    if size > units:
        name = config.privacy.units_name
        got = f"{size} of {units} {name}, a sampling_prob of {size / units:g}"
        raise ConfigError(
            "privacy.expected_batch_size",
            got,
            "a sampling_prob of at most 1",
            f"choose at most {units}",
        )
    return size / units


def mechanism_kind(config: Config) -> Json:
    """The name and the probes of a step's mechanism."""
    if METHODS[config.method.name].exact:
        return {"name": GAUSSIAN}
    return {
        "name": RANDOMIZED,
        "probes": config.privacy.probes,
        "probes_shared": config.privacy.shared_probes,
    }


def price(config: Config, sampling_prob: float) -> tuple[float, int]:
    """(noise multiplier, steps that the budget buys): the noise calibrated to the steps, or the
    steps counted for a given noise.
    """
    privacy, kind = config.privacy, mechanism_kind(config)
    if privacy.noise_multiplier is None:
        tokens, method = privacy.steps + privacy.spare_steps, kind.pop("name")
        return (
            calibration.noise_multiplier(
                privacy.epsilon, privacy.delta, sampling_prob, tokens, method=method, **kind
            ),
            tokens,
        )
    mechanism = Mechanism(
        **kind, sampling_prob=sampling_prob, noise_multiplier=privacy.noise_multiplier
    )
    tokens = calibration.steps_within(mechanism, privacy.epsilon, privacy.delta)
    if tokens == 0:
        fix = "raise privacy.noise_multiplier or privacy.epsilon"
        raise BudgetExceeded(
            "privacy.noise_multiplier is too small",
            privacy.noise_multiplier,
            "enough for one step",
            fix,
        )
    return privacy.noise_multiplier, tokens


def check_mechanism(mechanism: Mechanism, unit: str, study: Study) -> None:
    """Refuses a run whose steps are not those that the study's tokens pay for. Raises ConfigError,
    naming what differs.

    Args:
        unit: the run's privacy unit.
    """
    frozen = {**asdict(study.mechanism), "privacy unit": study.unit}
    for field, value in {**asdict(mechanism), "privacy unit": unit}.items():
        if value != frozen[field]:
            fix = "all runs of a study share one mechanism: vary what does not change it"
            raise ConfigError(
                f"the run has another {field} than study {study.name!r}",
                value,
                f"{frozen[field]!r}",
                fix,
            )
