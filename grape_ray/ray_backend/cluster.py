"""A Ray cluster for the time of a run: the one that is there, or a small local one that leaves
nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

from grape_ray.errors import ConfigError
from grape_ray.storage import Storage

# batches never travel through Ray, and its default takes a third of the memory
OBJECT_STORE_BYTES = 200_000_000

_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # also how long a report waits
}
_LOCAL_DEFAULTS = {
    # half of Ray reads it when it is imported, half when it starts; another's cluster has its own
    # mode
    "RAY_AUTH_MODE": "token",
    # The one switch that makes every Ray process listen on the loopback interface alone; macOS and
    # Windows have it so.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody drains the one machine
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
}


def set_defaults(start_timeout_s: float) -> None:
    """Settings that Ray takes from the environment, to be made before it is imported.

    What the user has set stays as it is, but for the deadline after which a group of workers that
    cannot be started is given up.
    """
    # another's cluster has its own settings, and a Ray that was imported has read its own
    local = {} if os.environ.get("RAY_ADDRESS") or "ray" in sys.modules else _LOCAL_DEFAULTS
    for name, value in {**_DEFAULTS, **local}.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{start_timeout_s:g}"


@contextlib.contextmanager
def cluster(workers: int, dashboard: bool = False) -> Iterator[None]:
    """Connects to Ray for the time of the block.

    A connection that exists is used and kept. Otherwise the cluster at RAY_ADDRESS is used, and
    left running; without one a local cluster is started, on the loopback interface alone, with a
    CPU a worker, and ended with the block.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(log_to_driver=False)
        except Exception as error:  # it may be gone since it was looked for
            raise not_reached(
                os.environ["RAY_ADDRESS"], f"{type(error).__name__}: {error}"
            ) from error
    else:
        start_local(max(workers, os.cpu_count() or 1), dashboard)
    try:
        yield
    finally:
        ray.shutdown()


def enter_folder(folder: str) -> None:
    """Goes to the launcher's folder, in a process of Ray's that has one of its own, so that paths
    of a config mean the same there; where this machine lacks it, nothing is done: a job's processes
    begin in its own copy.
    """
    if os.path.isdir(folder):
        os.chdir(folder)


def not_reached(address: str, reason: str) -> ConfigError:
    """The error for a cluster that is not there, or does not take this process."""
    got, fix = (
        f"{address!r}: {' '.join(reason.split())[:300]}",
        "start it (ray start --head), correct the address, or unset RAY_ADDRESS",
    )
    return ConfigError(
        "no Ray cluster can be used at RAY_ADDRESS",
        got,
        "a running cluster of this Ray version",
        fix,
    )


def start_local(cpus: int, dashboard: bool = False) -> None:
    """Starts a local cluster of this many logical CPUs; `ray.shutdown()` ends it.

    Args:
        dashboard: Ray Train under Ray Tune needs it: it asks the dashboard which trials have ended,
            and waits for ever without one.
    """
    import ray

    _make_token()
    store = OBJECT_STORE_BYTES
    ray.init(
        address="local",
        num_cpus=cpus,
        object_store_memory=store,
        include_dashboard=dashboard,
        log_to_driver=False,
    )


def _make_token() -> None:
    """The token that Ray's processes ask each other for, where there is none: Ray's own would be
    readable by everyone.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or any(
        os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    ):
        return
    folder, name = Path.home() / ".ray", "auth_token"
    if not (folder / name).exists():
        with contextlib.suppress(FileExistsError):
            Storage(folder).create(name, secrets.token_hex(32).encode(), private=True)
