"""What is asked of a run beside its config: where its files lie, how it is paid for, what it shares
with other runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from grape_ray.config.cautions import Consent
from grape_ray.ledger.entries import Study
from grape_ray.training.private_scores import Terms


@dataclass(frozen=True)
class Places:
    """Where the files of a run lie.

    Attributes:
        storage: path or URL of the folder of runs.
        ledger: path or URL of the dataset's ledger; None is the user's own ledger of this dataset
            (`ledger.location.ledger_place`).
        key_path: file of the master key; None is `privacy.keys.default_path()`.
    """

    storage: str = "runs"
    ledger: str | None = None
    key_path: str | None = None


@dataclass(frozen=True)
class Payment:
    """How a run with a study of its own is paid for.

    Attributes:
        ledger_budget: (epsilon, delta) of the dataset over all runs, where its ledger is made by
            this one; None is the run's own (of delta, in proportion to epsilon). A ledger that
            exists must have it.
        second_ledger: whether a dataset that is known to have a ledger may get another one, with a
            budget of its own.
        consent: what is done only where the user has said so.
    """

    ledger_budget: tuple[float | None, float | None] = (None, None)
    second_ledger: bool = False
    consent: Consent = Consent()  # noqa: RUF009  (frozen)


@dataclass(frozen=True)
class Shared:
    """What a run has in common with others, as a trial of a sweep has.

    Attributes:
        study: one that the ledger holds already, whose tokens the run shares; None registers a
            study of the run's own.
        origin, scores: see Plan.
    """

    study: Study | None = None
    origin: tuple[str, str] | None = None
    scores: Terms | None = None
