"""A trial of a sweep as Ray Tune sees it: a run that advances from one evaluation to the next, and
ends gracefully when it is stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from ray import tune

from grape_ray import checkpoint
from grape_ray.distributed.comms import Comms
from grape_ray.ledger.entries import Study
from grape_ray.privacy.redaction import redacted
from grape_ray.ray_backend.cluster import enter_folder
from grape_ray.ray_backend.ledger_client import LedgerActorClient
from grape_ray.ray_backend.trainer import fit
from grape_ray.ray_backend.trial_channel import RemoteChannel, TrialChannel
from grape_ray.storage import Json
from grape_ray.training.append_log import process_log
from grape_ray.training.callbacks import RunCallbacks
from grape_ray.training.plan import Plan
from grape_ray.training.planning import plan_run
from grape_ray.training.private_scores import Terms
from grape_ray.training.progress import Progress
from grape_ray.training.request import Places, Shared
from grape_ray.training.result import RunResult
from grape_ray.training.run import execute
from grape_ray.tuning.folder import EXECUTED, REPORTS
from grape_ray.tuning.spaces import SweepStudy

_POINTER = "pointer.json"
_POLL_S = 0.2
WORST = -1e30  # finite, so that percentiles over it are, too
_END_S = 600.0  # how long a run may take to end gracefully


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a sweep share; can be sent to any worker.

    Attributes:
        sweep: the space's study, its config as every trial begins from it. paid: the study that
            pays for the steps.
        storage: URL of the folder of runs. ledger, key_path: see Plan.
        ledger_client: of the training records' ledger.
        score_client: of the ledger of private validation records, and scores: what may be released
            about them; None where they are public.
        folder: the launcher's.
    """

    sweep: SweepStudy
    paid: Study
    storage: str
    ledger: str
    key_path: str | None
    ledger_client: LedgerActorClient
    score_client: LedgerActorClient | None = None
    scores: Terms | None = None
    folder: str = field(default_factory=os.getcwd)

    def plan(self, values: Json, run: str, origin: tuple[str, str] | None) -> Plan:
        """The plan of a trial's run, checked."""
        return plan_run(
            self.sweep.with_values(values),
            run=run,
            places=Places(self.storage, self.ledger, self.key_path),
            shared=Shared(self.paid, origin, self.scores),
        )


@dataclass(frozen=True)
class TrialCallbacks:
    """Makes the callbacks of a trial's run, on each of its ranks."""

    settings: TrialSettings
    channel: TrialChannel | RemoteChannel

    def __call__(self, plan: Plan) -> RunCallbacks:
        settings, steps = self.settings, process_log(plan.folder(), EXECUTED)

        def should_continue(progress: Progress) -> bool:
            steps.close()  # durable by now, also on an object store
            return self.channel.ask({"step": progress.step, "metrics": dict(progress.metrics)})

        def on_step(step: int) -> None:
            steps.line(str(step))

        callbacks = RunCallbacks(
            open_ledger=lambda plan: settings.ledger_client,
            on_step=on_step,
            should_continue=should_continue,
            on_end=steps.close,
        )
        scores = settings.score_client
        if scores is None:
            return callbacks
        return replace(callbacks, open_score_ledger=lambda plan: scores)


class Trial(tune.Trainable):
    """Lives in an actor of Ray Tune's; the run itself is in a thread, or on workers that the thread
    has launched.
    """

    def setup(self, config: Json, settings: TrialSettings) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        enter_folder(settings.folder)
        self._settings = settings
        self._begin(config)

    def step(self) -> Json:
        """Lets the run go on to its next evaluation, or to its end."""
        if self._thread is None:
            self._start()
        else:
            self._channel.answer(True)
        assert self._thread is not None
        while True:
            alive = self._thread.is_alive()
            report = self._channel.next(_POLL_S)
            if report is not None:
                return self._tune_result(report, done=False)
            if not alive:
                break
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._tune_result(
            {"step": self._result.steps, "metrics": self._result.metrics}, done=True
        )

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A pointer to the run's newest checkpoint, which itself stays where it is; JSON, because
        Ray Tune would pickle a dict.
        """
        pointer = self._pointer
        if self._last_step:
            facts = {
                "run": self._plan.run,
                "folder": self._plan.folder().url,
                "step": self._last_step,
            }
            pointer = {**facts, "values": _key(self._values)}
        Path(checkpoint_dir, _POINTER).write_text(json.dumps(pointer))

    def load_checkpoint(self, checkpoint: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._pointer = json.loads(Path(checkpoint, _POINTER).read_text())

    def reset_config(self, new_config: Json) -> bool:
        self._finish()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._finish()

    def _begin(self, values: Json) -> None:
        self._values, self._pointer, self._last_step = dict(values), None, 0
        self._thread: threading.Thread | None = None
        self._channel: TrialChannel | RemoteChannel = TrialChannel()
        self._result: RunResult | None = None
        self._metrics: dict[str, float] = {}
        self._error: BaseException | None = None

    def _start(self) -> None:
        run, origin = _run_of(self.trial_id, self._values, self._pointer)
        self._plan = self._settings.plan(self._values, run, origin)
        self._reports = process_log(self._plan.folder(), REPORTS)
        if self._plan.config.performance.num_workers:
            self._channel = RemoteChannel()
        make_callbacks = TrialCallbacks(self._settings, self._channel)
        self._thread = threading.Thread(
            target=self._run, args=(self._plan, make_callbacks), daemon=True
        )
        self._thread.start()

    def _run(self, plan: Plan, make_callbacks: TrialCallbacks) -> None:
        """The run, in its thread."""
        try:
            if plan.config.performance.num_workers:
                self._result = fit(plan, make_callbacks=make_callbacks)
            else:
                self._result = execute(plan, Comms.local(), make_callbacks(plan))
        except BaseException as error:  # Ray Tune keeps it in error.txt and error.pkl
            self._error = error if plan.public else redacted(error)

    def _tune_result(self, report: Json, done: bool) -> Json:
        """Ray Tune's result, which is kept beside the run, too. Where no score could be paid for,
        the last one stands.
        """
        self._last_step, self._metrics = report["step"], report["metrics"] or self._metrics
        facts = {"step": report["step"], **self._metrics, "run": self._plan.run}
        self._reports.line(json.dumps({**facts, "time": time.time(), "done": done}))
        metric = self._settings.sweep.metric
        return {**facts, metric: comparable(self._metrics.get(metric, 0.0)), "done": done}

    def _finish(self) -> None:
        """Ends the run gracefully, so that what never started is given back."""
        if self._thread is None:
            return
        if self._thread.is_alive():
            self._channel.answer(False)
            self._channel.close()
        # the run refunds what never started, which takes a moment
        self._thread.join(_END_S)
        self._reports.close()


def comparable(score: float) -> float:
    """The score for Ray Tune's comparisons, where one that is not finite is below all others.

    Compared with NaN, a trial would neither be stopped nor lose, and a median over one is NaN, so
    that no other trial would be stopped.
    """
    return score if math.isfinite(score) else WORST


def _run_of(trial: str, values: Json, pointer: Json | None) -> tuple[str, tuple[str, str] | None]:
    """(Name of a trial's run, the checkpoint that it begins from).

    The same configuration continues its run. One that continues another run's checkpoint, or its
    own with other values, is a new run, whose name follows from what it continues, so that a crash
    finds it again.
    """
    if pointer is None:
        return trial, None
    if pointer["values"] == _key(values) and pointer["run"].partition(".")[0] == trial:
        return pointer["run"], None
    digest = hashlib.sha256(
        json.dumps([pointer["run"], pointer["step"], _key(values)]).encode()
    ).hexdigest()
    return f"{trial}.{digest[:8]}", (pointer["folder"], checkpoint.folder_of(pointer["step"]))


def _key(values: Json) -> str:
    """The values as one text."""
    return json.dumps(
        {k: v.item() if hasattr(v, "item") else v for k, v in values.items()}, sort_keys=True
    )
