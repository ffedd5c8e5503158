"""The user's per-example loss: how it is called, and what it must return."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from grape_ray.engines.capture.batches import Batch
from grape_ray.errors import ConfigError

PerExampleLoss = Callable[[nn.Module, Batch], Tensor]


def losses_of(loss: PerExampleLoss, model: nn.Module, batch: Batch, examples: int) -> Tensor:
    """The losses (B,) of a batch. Raises ConfigError where they are not one an example."""
    with _uncompiled():
        return check_losses(loss(model, batch), examples)


def check_losses(losses: object, examples: int) -> Tensor:
    """The losses, if they are one an example."""
    if not isinstance(losses, Tensor) or losses.shape != (examples,):
        raise ConfigError(
            "per_example_loss",
            tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__,
            f"a tensor of shape ({examples},), one loss an example",
            "reduce over tokens, not over examples",
        )
    return losses


def _uncompiled() -> contextlib.AbstractContextManager[object]:
    """What torch.compile has compiled runs as it was written: a compiled graph would show no use of
    a parameter.
    """
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
