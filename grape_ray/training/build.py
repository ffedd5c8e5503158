"""What a config makes of a model: public keys, the engine that they and the config name, and the
model of a run's checkpoint.
"""

from __future__ import annotations

from torch import nn

from grape_ray import checkpoint
from grape_ray.checkpoint import Checkpoint
from grape_ray.config.schema import Config
from grape_ray.engines import Engine, from_config
from grape_ray.errors import CheckpointError
from grape_ray.models.attention import plain_attention_on_cpu
from grape_ray.privacy import keys
from grape_ray.storage import Storage

_PUBLIC = bytes(32)  # the root of every key that is no secret


def public_key(config: Config, stream: str) -> bytes:
    """The key of a public stream (`projection`, `rounding`, the baseline's `sampling` and
    `dropout`), a function of the public seed.
    """
    return keys.derive(_PUBLIC, "public", config.seed, stream)


def build_engine(config: Config, model: nn.Module) -> Engine:
    """The engine that the config names, with its public projections."""
    return from_config(model, config.privacy, config.method, public_key(config, "projection"))


def build_model(config: Config, device: str) -> nn.Module:
    """The task's model as it is trained on a kind of device: with the attention kernel that is
    fastest there in the run's precision. It is still on the CPU, whole.
    """
    model, performance = config.task.build_model(config.seed), config.performance
    if performance.precision == "bf16" and device == "cpu" and not performance.sharded:
        plain_attention_on_cpu(model, getattr(config.task, "max_tokens", 0))
    return model


def newest_checkpoint(folder: Storage) -> Checkpoint:
    """A run's newest whole checkpoint. Raises CheckpointError where there is none."""
    found = checkpoint.latest(folder)
    if found is None:
        raise CheckpointError(
            "the run has no checkpoint", folder.url, "a committed checkpoint", "train it first"
        )
    return found


def trained_model(config: Config, found: Checkpoint) -> nn.Module:
    """The task's model with the weights of a checkpoint."""
    model = config.task.build_model(config.seed)
    # a full checkpoint is weights alone; a delta needs the projections that it was made in
    checkpoint.restore(model, found, build_engine(config, model).subspace if found.base else None)
    return model
