"""Whether the workers of a run are available, checked before anything is paid for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from grape_ray.config.schema import Config
from grape_ray.errors import ConfigError
from grape_ray.ray_backend.cluster import not_reached

_PROBE = (
    "import ray; ray.init(log_to_driver=False, logging_level='CRITICAL'); print('GPUs',"
    " ray.cluster_resources().get('GPU', 0))"
)
_OF_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # with it a probe would pass for the job's own driver
_MOST_S = 60.0
# processes that any machine may hold, or so many a core where that is more
_FEW, _A_CORE = 32, 4


def check_workers(config: Config) -> None:
    """Checks that a cluster, or this machine, can give a run its workers.

    Raises:
        ConfigError: see `find_cluster`, or this machine has too few GPUs or cores.
    """
    performance = config.performance
    fewest, most = performance.workers
    # a cluster that grows by itself may have none of them yet: Ray waits for it
    if most == 0 or find_cluster(performance.start_timeout_s):
        return
    cpus, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    if performance.use_gpu and fewest > gpus:
        got, fix = (
            f"{fewest} workers with a GPU each",
            "lower performance.num_workers, unset performance.use_gpu, or name a cluster",
        )
        raise ConfigError(
            "performance.num_workers", got, f"at most this machine's {gpus} GPUs", fix
        )
    if most > max(_FEW, _A_CORE * cpus):
        got, fix = (
            f"{most} workers",
            "lower performance.num_workers, or name a cluster with RAY_ADDRESS",
        )
        raise ConfigError(
            "performance.num_workers",
            got,
            f"at most {max(_FEW, _A_CORE * cpus)} on this machine's {cpus} cores",
            fix,
        )


def find_cluster(deadline_s: float) -> bool:
    """Whether another's cluster will be used; looks for it in a process of its own, and takes over
    its mode of authentication.

    Ray reads RAY_AUTH_MODE when it is imported, and a cluster may have been started in either mode,
    before or after this machine had a token; what the user has set stays. Call it before Ray is
    imported.

    Raises:
        ConfigError: no cluster is at RAY_ADDRESS, or it is another version's, or wants another
            token.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return True
    address, reason = os.environ.get("RAY_ADDRESS"), ""
    if not address:
        return False
    for mode in (
        [os.environ["RAY_AUTH_MODE"]] if os.environ.get("RAY_AUTH_MODE") else ["", *_modes()]
    ):
        found = _probe(mode, min(deadline_s, _MOST_S))
        if found is None:
            if mode:
                os.environ["RAY_AUTH_MODE"] = mode
            return True
        reason = reason or found
        # another mode helps only where the token was refused
        if "uthentication" not in found:
            break
    raise not_reached(address, reason)


def _modes() -> list[str]:
    """Modes beside Ray's own choice; a token is needed for one of them."""
    known = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return [
        "disabled",
        *(["token"] if known or (Path.home() / ".ray" / "auth_token").exists() else []),
    ]


def _probe(mode: str, deadline_s: float) -> str | None:
    """Why no connection was made in this mode; None where one was."""
    env = {name: value for name, value in os.environ.items() if name != _OF_A_JOB}
    if mode:
        env["RAY_AUTH_MODE"] = mode
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=env,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {deadline_s:g} s"
    if done.returncode == 0 and "GPUs" in done.stdout:
        return None
    said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(" ")]
    return next(
        (line for line in reversed(said) if "Error" in line),
        said[-1] if said else f"exit status {done.returncode}",
    )
