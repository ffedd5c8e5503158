"""What is checked of a run before its data is read: its name, and what this machine can do."""

from __future__ import annotations

import secrets
import time

import torch

from grape_ray.config.methods import METHODS
from grape_ray.config.schema import Config
from grape_ray.errors import ConfigError


def fresh_name(kind: str) -> str:
    """A name that no other run or sweep has: its kind, the time in UTC and random digits."""
    return f"{kind}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def check_run_name(run: str) -> None:
    if (
        not run
        or run in (".", "..")
        or not all(c.isalnum() or c in "._-" for c in run)
        or not run.isascii()
    ):
        raise ConfigError(
            "run", run, "letters, digits, dots, dashes and underscores", "choose another name"
        )


def check_machine(config: Config) -> None:
    """Refuses what this machine, or the method, cannot do. Raises ConfigError."""
    if (
        config.performance.use_gpu
        and config.performance.workers[1] == 0
        and not torch.cuda.is_available()
    ):
        raise ConfigError(
            "performance.use_gpu",
            "no GPU in this process",
            "a machine with one",
            "unset it, or ask for --workers on a cluster",
        )
    _check_sharding(config)
    _check_precision(config)


def _check_sharding(config: Config) -> None:
    """Whether the method trains weights that no worker holds whole."""
    if not config.performance.sharded:
        return
    if config.performance.workers[1] == 0:
        fix = "set performance.num_workers, or --workers"
        raise ConfigError("performance.sharded", "0 workers", "at least one Ray Train worker", fix)
    known = [name for name, info in METHODS.items() if info.shards]
    if config.method.name not in known:
        raise ConfigError(
            "method.name with performance.sharded",
            config.method.name,
            "one of " + ", ".join(known),
            "unset performance.sharded",
        )
    if getattr(config.task, "weights", "") == "nf4":
        fix = "unset performance.sharded, or set task.weights=bf16"
        raise ConfigError("performance.sharded", "weights in four bits", "bf16 or fp32", fix)


def _check_precision(config: Config) -> None:
    """Whether the method may be trained in the precision that was asked for."""
    half = config.performance.precision == "bf16"
    if half and METHODS[config.method.name].subspace == "directions":
        raise ConfigError(
            f"performance.precision with method `{config.method.name}`",
            "bf16",
            "fp32: a slope is a small difference of two losses",
            "unset performance.precision",
        )
