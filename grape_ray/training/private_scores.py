"""What a run may say of its validation records: all of public ones; of private ones a noised score,
charged to their own ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from grape_ray.errors import ConfigError
from grape_ray.ledger.interface import LedgerClient
from grape_ray.privacy import keys
from grape_ray.privacy.noise import grid_and_std, on_grid
from grape_ray.privacy.random_streams import normals
from grape_ray.storage import Json

PUBLIC = "public"


@dataclass(frozen=True)
class Terms:
    """What a run may say of validation records that are private; a part of the run's description,
    so whoever resumes it keeps them.

    Attributes:
        metric: the one that is released, noised. noise_multiplier: noise standard deviation on the
            sum over the records.
        ledger: URL of the validation records' own ledger. study: the study there that pays.
    """

    metric: str
    noise_multiplier: float
    ledger: str
    study: str


def check_metric(task: object, metric: str, unit: str) -> None:
    """Refuses private scores that their noise would not cover: of a metric that the task does not
    call bounded, or where a privacy unit (`privacy.unit`) may have several validation records, each
    of which moves the score. Raises ConfigError.
    """
    if unit:
        raise ConfigError(
            "private scores with privacy.unit",
            unit,
            "none: their noise covers one validation record, not all those of a unit",
            "score on public validation records, or unset privacy.unit",
        )
    bounded = getattr(task, "bounded_metrics", ())
    if metric not in bounded:
        fix = (
            "one record moves another metric by more than the noise covers; name bounded ones in"
            " the task's bounded_metrics"
        )
        raise ConfigError(
            "the metric of private scores", metric, ", ".join(bounded) or "a bounded metric", fix
        )


def described(terms: Terms | None) -> str | Json:
    """The terms as a run's description keeps them."""
    return PUBLIC if terms is None else asdict(terms)


def rebuilt(description: Any) -> Terms | None:
    """The terms that `described` described; None where the validation records are public.

    Raises:
        ConfigError: the description says neither; then nothing may be said of the records.
    """
    if description == PUBLIC:
        return None
    try:
        return Terms(**description)
    except TypeError as error:
        fix = "begin a new run, which says it"
        what = "the run does not say whether its validation records are public"
        raise ConfigError(what, None, "a description with 'validation'", fix) from error


class PrivateScore:
    """Turns validation metrics into the one noised score of a run.

    The metric is the mean over the records of a value in [0, 1], so its sum moves by at most 1 with
    one record; the noise has standard deviation `noise_multiplier` on the sum, and both are added
    on a grid (`noise.on_grid`). Each score burns a token of the study before its noise is drawn.
    That each record's value is in [0, 1] cannot be seen from their mean: the task says it
    (`bounded_metrics`), and SweepStudy refuses other metrics.

    Args:
        open_ledger: gives the ledger of the validation records. terms: what is released, and the
            study that pays for it.
        run: name there. key_path: file of the master key.
        dataset_id: fingerprint of the records that are scored; their ledger refuses others.
    """

    def __init__(
        self,
        open_ledger: Callable[[], LedgerClient],
        terms: Terms,
        run: str,
        key_path: str | None,
        dataset_id: str,
    ):
        self._open_ledger, self._terms, self._run = open_ledger, terms, run
        self._key_path, self._dataset_id = key_path, dataset_id
        self._ledger: LedgerClient | None = None
        self._attempt, self._key, self._given = 0, b"", 0

    def __call__(self, metrics: Mapping[str, float], records: int) -> dict[str, float]:
        """The noised metric alone, to six significant digits; nothing where the budget for scores
        is spent.

        Raises:
            ConfigError: the metric is missing or no mean of values in [0, 1]. GrapeRayError: the
                ledger refuses or cannot be reached.
        """
        value = metrics.get(self._terms.metric)
        if value is None or not 0 <= value <= 1:
            expected = "a validation metric that is a mean of values in [0, 1]"
            got = "no such metric" if value is None else "another value"  # which one is private
            raise ConfigError(
                f"the private score {self._terms.metric}",
                got,
                expected,
                "choose such a metric, as accuracy is",
            )
        if self._ledger is None:
            self._begin()
        assert self._ledger is not None
        if (
            self._ledger.charge(
                self._terms.study,
                self._run,
                self._attempt,
                self._given,
                1,
                dataset_id=self._dataset_id,
            ).steps
            == 0
        ):
            return {}
        noise = normals(self._key, self._given, 0, 1)
        self._given += 1
        grid, std = grid_and_std(1.0, self._terms.noise_multiplier, 1)
        released = on_grid(torch.tensor([value * records], dtype=torch.float64), noise, std, grid)
        # six digits are post-processing, and more would be noise
        return {self._terms.metric: float(f"{float(released) / records:.6g}")}

    def _begin(self) -> None:
        """A new attempt, with a key of its own."""
        self._ledger, master = self._open_ledger(), keys.master_key(self._key_path)
        self._attempt = self._ledger.begin_attempt(
            self._terms.study, self._run, keys.key_id(master), dataset_id=self._dataset_id
        )
        self._key = keys.derive(
            keys.of_attempt(
                master, self._ledger.ledger_id, self._terms.study, self._run, self._attempt
            ),
            "scores",
        )
