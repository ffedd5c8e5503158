"""How a run ended, as its folder keeps it and every rank returns it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from grape_ray.accounting.mechanism import RECORD
from grape_ray.storage import Json, Storage

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        private: whether the method carries a guarantee.
        epsilon, delta: the target, of the whole study, because its tokens can still be spent.
        unit: the privacy unit, by the name of its column; `record` where there is none.
        examples_per_unit: records of it that a step takes at most; None for a record.
        epsilon_spent: by the study's steps so far, for display.
        steps: that the model has taken.
        metrics: on the validation records, at metrics_step.
        problems: what failed without ending the run, in lines for a person.
        peak_bytes: largest over processes. checkpoint, ledger: URLs.
        exhausted: whether the budget ended it. stopped: whether a sweep did, or `diverged` metrics,
            which were not finite twice.
        executed_steps: known to have been executed, repeats included. charged_steps, attempts: of
            this run, in the ledger.
        workers: Ray Train workers; 0 in one process.

    epsilon, delta, epsilon_spent, noise_multiplier and ledger are None for method `none`.
    """

    run: str
    method: str
    private: bool
    epsilon: float | None
    epsilon_spent: float | None
    delta: float | None
    steps: int
    noise_multiplier: float | None
    metrics: dict[str, float]
    metrics_step: int | None
    problems: list[str]
    seconds: float
    peak_bytes: int
    checkpoint: str
    ledger: str | None
    exhausted: bool
    stopped: bool
    diverged: list[str]
    executed_steps: int
    charged_steps: int
    attempts: int
    steps_per_s: float
    workers: int
    unit: str = RECORD
    examples_per_unit: int | None = None

    def as_dict(self) -> Json:
        """JSON values by name."""
        return asdict(self)

    def save(self, folder: Storage) -> None:
        """Makes it durable in the run's folder."""
        folder.write(RESULT_FILE, json.dumps(self.as_dict(), indent=1, sort_keys=True).encode())


def read_result(folder: Storage) -> RunResult:
    """The result of a run that has ended. Raises FileNotFoundError where it has not."""
    return from_dict(json.loads(folder.read(RESULT_FILE)))


def from_dict(values: Json) -> RunResult:
    """What `as_dict` gave; a value that an earlier version did not keep is None, and its unit a
    record.
    """
    values = {"unit": RECORD, **values}
    return RunResult(**{name: values.get(name) for name in RunResult.__dataclass_fields__})  # pyright: ignore[reportArgumentType]
