"""Gauges for Prometheus, through Ray's metrics: of a run, and of the studies of a ledger.

Ray's agent on a process's node exports them (`ray metrics launch-prometheus`), with `ray_` before
their names.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

_PREFIX = "grape_"
_RUN = {
    "steps": "Steps that the model has taken.",
    "steps_per_second": "Mean speed of this attempt.",
    "epsilon_spent": "Epsilon of the steps charged so far, at the study's delta.",
    "tokens_left": "Steps that the study can still pay for.",
    "upload_lag_seconds": (
        "From the newest checkpoint's copy in memory to its manifest, or until now."
    ),
    "checkpoints_skipped": "Checkpoints skipped because the one before was still in flight.",
    "attempt": "Number of the attempt.",
}
# Names of their own: Prometheus takes one set of tags a name.
_STUDY = {
    "study_steps_charged": "Step tokens of a study that were charged.",
    "study_tokens_left": "Step tokens of a study that can still be charged.",
    "study_epsilon_spent": "Epsilon of the steps charged so far, at the study's delta.",
}


class Gauges:
    """The gauges of one run."""

    def __init__(self, run: str):
        self._tags, self._gauges = {"run": run}, _made(_RUN, "run")

    def __call__(self, figures: Mapping[str, float]) -> None:
        """Sets the gauges of these names (without the prefix)."""
        for name, value in figures.items():
            self._gauges[name].set(value, tags=self._tags)


class StudyGauges:
    """The gauges of a ledger's studies."""

    def __init__(self) -> None:
        self._gauges = _made(_STUDY, "ledger", "study")

    def set(self, ledger: str, study: str, **figures: float) -> None:
        """Sets `steps_charged`, `tokens_left` or `epsilon_spent` of a study."""
        for name, value in figures.items():
            self._gauges[f"study_{name}"].set(value, tags={"ledger": ledger, "study": study})


def _made(descriptions: Mapping[str, str], *tag_keys: str) -> dict[str, Gauge]:
    return {
        name: Gauge(_PREFIX + name, description, tag_keys=tag_keys)
        for name, description in descriptions.items()
    }
