"""Settings that the mathematics allows and that are rarely meant: refused unless the user says so
outright, or warned of.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from grape_ray.config.methods import METHODS
from grape_ray.config.schema import Config, Privacy
from grape_ray.errors import Caution, ConfigError

_MUCH_EPSILON = 20.0
_SMALL_BATCH = 16


@dataclass(frozen=True)
class Consent:
    """What the user has said outright: a delta of at least one over the number of units, a run
    without any guarantee on private data.
    """

    large_delta: bool = False
    not_private: bool = False


def check(config: Config, units: int, public: bool, consent: Consent) -> None:
    """Refuses what nobody agreed to, and warns of a weak guarantee and of tiny batches.

    Args:
        units: how many privacy units train. public: whether they hold nobody's secrets, and no
            ledger of the user's says otherwise.

    Raises:
        ConfigError: method `none` on private records, or a delta of at least one over the number of
            units, without consent.
    """
    if METHODS[config.method.name].private:
        privacy = config.privacy
        check_delta("privacy.delta", privacy.delta, units, privacy.units_name, consent)
        warn(config.privacy)
    elif not (public or consent.not_private):
        expected = "a private method, or records that their task calls public (task.public=true)"
        fix = (
            "to train on private records without any guarantee, say --not-private"
            " (not_private=True): results and exports then say so"
        )
        raise ConfigError("method.name", config.method.name, expected, fix)


def check_delta(name: str, delta: float, count: int, units: str, consent: Consent) -> None:
    """Refuses a delta with which publishing a whole unit, chosen at random, would count as private.

    Args:
        count: how many units there are. units: what they are called (`Privacy.units_name`).

    Raises:
        ConfigError: the delta is at least 1 / count, without consent.
    """
    if delta * count >= 1 and not consent.large_delta:
        what = (
            f"{name} is not below one over the number of {units}: giving a whole one away would"
            " be allowed"
        )
        fix = f"choose {0.1 / count:.1g} or less, or say --allow-large-delta (large_delta=True)"
        raise ConfigError(what, f"{delta:g}", f"below 1 / {count} = {1 / count:.3g}", fix)


def warn(privacy: Privacy) -> None:
    """Warns of an epsilon that guarantees hardly anything, and of batches in which noise drowns
    what is learned.
    """
    if privacy.epsilon > _MUCH_EPSILON:
        _say(
            f"privacy.epsilon {privacy.epsilon:g} guarantees next to nothing: typical values lie"
            " between 0.5 and 10"
        )
    if privacy.expected_batch_size < _SMALL_BATCH:
        size = privacy.expected_batch_size
        _say(
            f"privacy.expected_batch_size {size} is small: a step's noise is the same for any size,"
            " so larger batches learn more"
        )


def warn_of_rest(budget: tuple[float, float], share: tuple[float, float]) -> None:
    """Warns of a new ledger's (epsilon, delta) of which a first share takes all of the one and not
    of the other: no second share fits.
    """
    left = [whole - part > 1e-9 * whole for whole, part in zip(budget, share)]
    if any(left) and not all(left):
        have, lack = ("epsilon", "delta") if left[0] else ("delta", "epsilon")
        _say(
            f"this run takes all {lack} of the new ledger, so the {have} that is left pays for no"
            f" other run: raise --ledger-{lack}"
        )


def _say(text: str) -> None:
    warnings.warn(text, Caution, stacklevel=2)
