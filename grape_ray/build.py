"""What a config makes of a model: public keys, and the engine that they and the config name."""

from __future__ import annotations

from typing import Any

from grape_ray.accounting import keys
from grape_ray.config import Config
from grape_ray.engines import Engine, from_config

_PUBLIC = bytes(32)  # the root of every key that is no secret


def public_key(config: Config, stream: str) -> bytes:
    """The key of a public stream (`projection`, `rounding`, the yardstick's `sampling` and `dropout`), a function of the public seed."""
    return keys.derive(_PUBLIC, "public", config.seed, stream)


def build_engine(config: Config, model: Any) -> Engine:
    """The engine that the config names, with its public projections."""
    return from_config(model, config.privacy, config.method, public_key(config, "projection"))
