"""A run's figures for Prometheus, through Ray's metrics: steps, epsilon spent, tokens left, upload
lag.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

DESCRIPTIONS = {
    "grape_steps": "Steps that the model has taken.",
    "grape_steps_per_second": "Mean speed of this attempt.",
    "grape_epsilon_spent": "Epsilon of the steps charged so far, at the study's delta.",
    "grape_tokens_left": "Steps that the study can still pay for.",
    "grape_upload_lag_seconds": (
        "From the newest checkpoint's copy in memory to its manifest, or until now."
    ),
    "grape_checkpoints_skipped": (
        "Checkpoints left out because the one before was still on its way."
    ),
    "grape_attempt": "Number of the attempt.",
}


class Gauges:
    """The gauges of one run; Ray's agent on the worker's node exports them
    (`ray metrics launch-prometheus`).
    """

    def __init__(self, run: str):
        self._tags = {"run": run}
        self._gauges = {
            name: Gauge(name, description, tag_keys=("run",))
            for name, description in DESCRIPTIONS.items()
        }

    def __call__(self, figures: Mapping[str, float]) -> None:
        """Sets those of `figures` (names without the prefix) that there is a gauge for."""
        for name, value in figures.items():
            self._gauges[f"grape_{name}"].set(value, tags=self._tags)
