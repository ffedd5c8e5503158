"""What a sweep came to: `result.json` of its folder, and what `grape-ray tune --json` prints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from grape_ray.accounting import calibration
from grape_ray.accounting.mechanism import RECORD, Mechanism
from grape_ray.ledger.entries import Study
from grape_ray.ledger.ledger import Ledger
from grape_ray.storage import Json, Storage
from grape_ray.tuning import trials
from grape_ray.tuning.folder import RESULT_FILE, read
from grape_ray.tuning.sweep import Sweep


@dataclass(frozen=True)
class Winner:
    """The best run of a sweep.

    Attributes:
        config: its values of the varied fields, by name. score: its last one.
        run: its name. steps: that its model has taken.
        naive_epsilon: of its own steps alone, which is not what tuning costs; None without any.
    """

    config: Json
    score: float
    run: str
    steps: int
    naive_epsilon: float | None


@dataclass(frozen=True)
class SweepResult:
    """What a sweep cost, and its winner. The order of the fields is that of the JSON.

    Attributes:
        sweep: URL of its folder. study: name in the ledger. mode: `compose` or `select`.
        epsilon, delta: cost of all that the sweep releases. noise_multiplier: of every step.
        tokens_total, tokens_charged: step tokens of the study. steps_executed: that processes took;
            wasted: charged, but not executed. trials: how many. In mode select these five are None:
            how many trials there were is secret, and so is every number that would tell it.
        best: the winner; None where no score is finite.
        ledger: URL. score_source: `public` or `private`. score_ledger: URL of the ledger of private
            validation records; None where they are public.
        unit: the privacy unit, by the name of its column; `record` where there is none.
    """

    sweep: str
    study: str
    mode: str
    epsilon: float
    delta: float
    noise_multiplier: float
    tokens_total: int | None
    tokens_charged: int | None
    steps_executed: int | None
    wasted: int | None
    trials: int | None
    best: Winner | None
    ledger: str
    score_source: str
    score_ledger: str | None
    unit: str = RECORD

    def as_json(self) -> Json:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Json) -> SweepResult:
        """The result whose `as_json` this is."""
        best = found["best"]
        return cls(**{**found, "best": None if best is None else Winner(**best)})


def composed(sweep: Sweep) -> SweepResult:
    """The result of a sweep in mode compose, from its folder and its ledger.

    Raises:
        LedgerError: the ledger cannot be read.
    """
    paid = sweep.steps.paid
    assert isinstance(paid, Study)
    rows = trials.rows(sweep.folder(), read(sweep.folder()))
    best = trials.best(rows)
    charged = Ledger.open(sweep.steps.ledger, create=False).state.study(paid.name).used
    executed = sum(row.executed for row in rows)
    winner = None
    if best is not None and best.score is not None:
        naive = naive_epsilon(paid.mechanism, best.steps, paid.delta)
        winner = Winner(best.values, best.score, best.run, best.steps, naive)
    return _result(
        sweep,
        winner,
        tokens_total=paid.tokens,
        tokens_charged=charged,
        steps_executed=executed,
        wasted=charged - executed,
        trials=len({row.trial for row in rows}),
    )


def selected(sweep: Sweep, winner: Winner | None) -> SweepResult:
    """The result of a sweep in mode select, which knows its winner and nothing else."""
    return _result(sweep, winner)


def naive_epsilon(mechanism: Mechanism, steps: int, delta: float) -> float | None:
    """Epsilon of one run's own steps, as if it were all that was tried; None without a step."""
    return calibration.epsilon(mechanism, steps, delta) if steps else None


def save(folder: Storage, result: SweepResult) -> None:
    """Keeps the result in the sweep's folder."""
    text = json.dumps(result.as_json(), indent=1, sort_keys=True)
    folder.write(RESULT_FILE, text.encode())


def load(folder: Storage) -> SweepResult | None:
    """The result that a sweep's folder keeps; None where the sweep has not ended."""
    if not folder.exists(RESULT_FILE):
        return None
    return SweepResult.from_json(json.loads(folder.read(RESULT_FILE)))


def _result(
    sweep: Sweep,
    winner: Winner | None,
    *,
    tokens_total: int | None = None,
    tokens_charged: int | None = None,
    steps_executed: int | None = None,
    wasted: int | None = None,
    trials: int | None = None,
) -> SweepResult:
    paid = sweep.steps.paid
    return SweepResult(
        sweep=f"{sweep.storage}/{sweep.name}",
        study=paid.name,
        mode=sweep.options.mode,
        epsilon=paid.epsilon,
        delta=paid.delta,
        noise_multiplier=paid.mechanism.noise_multiplier,
        tokens_total=tokens_total,
        tokens_charged=tokens_charged,
        steps_executed=steps_executed,
        wasted=wasted,
        trials=trials,
        best=winner,
        ledger=sweep.steps.ledger,
        score_source=sweep.study.score_source,
        score_ledger=sweep.scores.ledger if sweep.scores else None,
        unit=paid.unit,
    )
