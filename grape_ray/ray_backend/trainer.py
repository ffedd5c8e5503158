"""A run on Ray Train workers: one process a rank, restarted as a new attempt when one is lost."""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from grape_ray import checkpoint
from grape_ray.distributed.comms import Comms
from grape_ray.errors import GrapeRayError, Interrupted, TaskFailed
from grape_ray.privacy.redaction import run_redacted, text_of
from grape_ray.ray_backend.cluster import cluster, enter_folder, set_defaults
from grape_ray.storage import Json
from grape_ray.training.callbacks import RunCallbacks
from grape_ray.training.journal import PROGRESS_FILE
from grape_ray.training.plan import Plan
from grape_ray.training.progress import Progress
from grape_ray.training.result import RESULT_FILE, RunResult, read_result
from grape_ray.training.run import execute, interrupted

_WATCH_EVERY_S = 0.5


class WorkersFailed(GrapeRayError):
    """Workers were lost more often than performance.max_failures allows, or could not be started in
    time.
    """


def fit(
    plan: Plan,
    on_progress: Callable[[Progress, float | None], None] | None = None,
    make_callbacks: Callable[[Plan], RunCallbacks] | None = None,
) -> RunResult:
    """Runs a plan on its workers and returns what `execute` returned there.

    Args:
        on_progress: see RunCallbacks. make_callbacks: makes a sweep's callbacks, on each worker.

    Raises:
        WorkersFailed: the cluster did not give the workers within performance.start_timeout_s, or
            too many were lost.
        GrapeRayError: what a worker raised, if it is this project's own.
    """
    performance = plan.config.performance
    set_defaults(performance.start_timeout_s)
    import ray.train
    from ray.exceptions import RayError
    from ray.train.torch import TorchTrainer

    from grape_ray.ray_backend.preemption import SignalTorchConfig
    from grape_ray.ray_backend.stop_signal import call_until_stopped, make_stop_signal

    # its own lines would bury the run's progress
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    # an earlier launch's: its being there is how this one's end is known
    plan.folder().remove(RESULT_FILE)
    fewest, most = performance.workers
    folder = os.getcwd()
    with cluster(most), _watching(plan, on_progress):
        stop = make_stop_signal()
        trainer = TorchTrainer(
            lambda: worker(plan, stop, make_callbacks, folder),
            torch_config=SignalTorchConfig(backend="nccl" if performance.use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=most if fewest == most else (fewest, most),
                use_gpu=performance.use_gpu,
                elastic_resize_monitor_interval_s=performance.resize_every_s,
            ),
            run_config=ray.train.RunConfig(
                # A name of its own for each launch: under the same one Ray would restore the state
                # of an earlier launch, but checkpoints and what is paid for are this package's own,
                # so a run resumes whatever wrote it, with any number of workers or none.
                name=f"ray-{secrets.token_hex(4)}",
                storage_path=f"{plan.storage}/{plan.run}",
                # A group that cannot be started is the controller's failure; by default Ray tries
                # again for ever. A range of workers is tried again: just after a node has gone, Ray
                # asks for as many as were there before.
                failure_config=ray.train.FailureConfig(
                    max_failures=performance.max_failures,
                    controller_failure_limit=0 if fewest == most else performance.max_failures,
                ),
            ),
        )
        try:
            launch = partial(_launch, plan, trainer.fit)
            if call_until_stopped(launch, stop) and not plan.folder().exists(RESULT_FILE):
                raise interrupted(
                    plan,
                    max(
                        (checkpoint.step_of(name) for name in checkpoint.names(plan.folder())),
                        default=0,
                    ),
                )
        except ray.train.TrainingFailedError as error:
            raise _translated(error, plan) from error
        except RayError as error:  # of Ray itself, as of a cluster that goes away
            fix = f"see the cluster's logs; then run `grape-ray resume {plan.folder().url}`"
            raise WorkersFailed(
                "Ray could not run the workers", _last_line(error), "a cluster that stays", fix
            ) from error
    return read_result(plan.folder())


def _launch(plan: Plan, fit: Callable[[], object]) -> None:
    """Runs the workers to their end; a range of them for as long as the cluster has capacity for
    the fewest.
    """
    from grape_ray.ray_backend.capacity import call_within_capacity

    performance = plan.config.performance
    fewest, most = performance.workers
    if fewest == most:
        fit()
    elif not call_within_capacity(fit, fewest, performance.use_gpu, performance.start_timeout_s):
        raise _too_small(plan, "too few for too long")


def worker(
    plan: Plan, stop: Any, make_callbacks: Callable[[Plan], RunCallbacks] | None, folder: str
) -> None:
    """One rank, inside a Ray Train worker; `folder` is the launcher's. What it raises, Ray writes
    into logs.
    """
    enter_folder(folder)
    run_redacted(lambda: _work(plan, stop, make_callbacks), plan.public)


def _work(plan: Plan, stop: Any, make_callbacks: Callable[[Plan], RunCallbacks] | None) -> None:
    import ray.train
    from ray.train.torch import get_device

    from grape_ray.ray_backend.metrics import Gauges
    from grape_ray.ray_backend.preemption import PreemptionWatcher

    def report(name: str, metadata: Json) -> None:
        """Tells Ray's callbacks of a checkpoint, which stays where it is: a report for each step
        would cost Ray's polling time.
        """
        ray.train.report(
            {
                **metadata["metrics"],
                "step": metadata["step"],
                "checkpoint_path": f"{plan.folder().url}/{name}",
            }
        )

    comms = Comms.distributed()
    watcher = PreemptionWatcher(comms, stop)
    callbacks = replace(
        make_callbacks(plan) if make_callbacks else RunCallbacks(),
        on_checkpoint=report,
        agree_on_signal=watcher,
        on_gauges=Gauges(plan.run),
    )
    device = get_device() if plan.config.performance.use_gpu else None
    try:
        execute(plan, comms, callbacks, device)
    except Interrupted:
        # Only the launcher's stop ends the run. After SIGTERM to one worker the attempt must fail,
        # so that Ray begins another one elsewhere.
        if not comms.broadcast_object(watcher.stopped):
            raise


def _translated(error: Exception, plan: Plan) -> GrapeRayError:
    """A worker's own error where there is one, otherwise what happened to the workers."""
    performance = plan.config.performance
    failures = [
        f for f in getattr(error, "worker_failures", {}).values() if isinstance(f, Exception)
    ]
    causes = [getattr(failure, "cause", failure) for failure in failures]
    # one rank's own error says more than that the others lost their peer
    for cause in causes:
        if isinstance(cause, GrapeRayError) and not isinstance(cause, TaskFailed):
            return cause
    if not failures:
        return _too_small(plan, _last_line(error))
    # Of Ray's own errors the text says which machine or process was lost; those of the task's code
    # may quote a record.
    reason = " | ".join(
        dict.fromkeys(_last_line(c) if plan.public or _is_rays(c) else text_of(c) for c in causes)
    )
    fix = f"see what ended them; then run again with the name {plan.run} to resume"
    return WorkersFailed(
        "workers failed too often", reason, f"at most {performance.max_failures} failures", fix
    )


def _last_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"


def _is_rays(error: BaseException) -> bool:
    """Whether Ray itself says it, of a worker that was lost, and not code that ran there."""
    import ray.exceptions

    return isinstance(error, ray.exceptions.RayError) and not isinstance(
        error, ray.exceptions.RayTaskError
    )


def _too_small(plan: Plan, reason: str) -> WorkersFailed:
    performance = plan.config.performance
    need = (
        f"{performance.num_workers} workers with a {'GPU' if performance.use_gpu else 'CPU'} each"
    )
    fix = "lower performance.num_workers, or enlarge the cluster"
    return WorkersFailed(
        f"the cluster gave no workers within {performance.start_timeout_s:g} s", reason, need, fix
    )


class _watching:
    """Passes on the progress that rank 0 keeps in the run's folder, for the time of a block."""

    def __init__(self, plan: Plan, on_progress: Callable[[Progress, float | None], None] | None):
        self._folder, self._on_progress = plan.folder(), on_progress
        self._over = threading.Event()
        self._seen = b""
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._folder.remove(PROGRESS_FILE)
        if self._on_progress:
            self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._on_progress:
            self._thread.join()
            self._look()

    def _watch(self) -> None:
        while not self._over.wait(_WATCH_EVERY_S):
            self._look()

    def _look(self) -> None:
        try:
            text = self._folder.read(PROGRESS_FILE)
        except (FileNotFoundError, GrapeRayError):
            return
        if text != self._seen and self._on_progress:
            self._seen = text
            fields = json.loads(text)
            self._on_progress(
                Progress(**{k: v for k, v in fields.items() if k != "epsilon"}), fields["epsilon"]
            )
