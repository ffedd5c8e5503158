"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, and the
result.
"""

from __future__ import annotations

import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from grape_ray.training.progress import Progress as RunProgress
from grape_ray.training.result import RunResult

_LINE_EVERY_S = 10.0


class Reporter:
    """Shows progress on a stream.

    Args:
        stream: where to write, stderr as a rule. total: steps planned.
    """

    def __init__(self, stream: TextIO, total: int):
        self._console = Console(file=stream, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._total, self._next_s, self._shown_metrics = total, 0.0, None
        if self._console.is_terminal:
            text = "{task.fields[state]}"
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn(text),
                console=self._console,
            )
            self._row = self._bar.add_task("train", total=total, state="starting")

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, markup=False)

    def __call__(self, progress: RunProgress, epsilon: float | None) -> None:
        """Shows a `grape_ray.training.loop.Progress` and the epsilon spent so far (None without a
        guarantee).
        """
        state = describe(progress, epsilon)
        if self._bar:
            self._bar.update(self._row, completed=progress.step, state=state)
            return
        now, fresh = (
            time.monotonic(),
            progress.metrics_step is not None and progress.metrics_step != self._shown_metrics,
        )
        if fresh or now >= self._next_s:
            self._next_s, self._shown_metrics = now + _LINE_EVERY_S, progress.metrics_step
            self.say(f"step {progress.step}/{progress.total}  {state}")


def describe(progress: RunProgress, epsilon: float | None) -> str:
    """Epsilon spent, speed, time left and the newest metrics, in one line."""
    parts = [] if epsilon is None else [f"epsilon {epsilon:.3f}"]
    if progress.steps_per_s:
        left_s = (progress.total - progress.step) / progress.steps_per_s
        parts += [
            f"{progress.steps_per_s:.2f} steps/s",
            f"{int(left_s // 60)}:{int(left_s % 60):02d} left",
        ]
    parts += [f"{name} {value:.4f}" for name, value in progress.metrics.items()]
    return "  ".join(parts)


def summary(result: RunResult) -> list[str]:
    """The result in lines for a person."""
    if result.ledger is None:
        guarantee = "NOT PRIVATE: no guarantee for any training record"
    else:
        guarantee = (
            f"epsilon {result.epsilon:g} at delta {result.delta:g} for one {result.unit},"
            " noise multiplier"
            f" {result.noise_multiplier:.4g}"
        )
    metrics = (
        ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()) or "no metrics"
    )
    if result.metrics_step not in (None, result.steps):
        metrics += f" (of step {result.metrics_step})"
    lines = [
        f"{result.run}: {result.steps} steps of {result.method}, {guarantee}",
        (
            f"validation: {metrics}; {result.seconds:.1f} s, peak"
            f" {result.peak_bytes / 2**20:.0f} MiB a process"
        ),
        f"checkpoint {result.checkpoint}",
    ]
    if result.ledger:
        spent = f"epsilon {result.epsilon_spent:.3f} spent so far"
        lines.append(
            f"ledger {result.ledger}: {result.charged_steps} steps charged in"
            f" {result.attempts} attempt(s), {spent}"
        )
    lines += [f"problem: {problem}" for problem in result.problems]
    if result.diverged:
        names = ", ".join(result.diverged)
        lines.append(
            f"ended early, before more was paid: {names} was not finite twice"
            " (performance.stop_on_nan=false continues)"
        )
    if any(problem.startswith("an evaluation failed") for problem in result.problems):
        lines.append("evaluate again, free of privacy cost: grape-ray evaluate RUN")
    if result.exhausted:
        lines.append("the privacy budget ended the run before its last planned step")
    return lines
