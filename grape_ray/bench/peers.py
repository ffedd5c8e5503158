"""Opacus as its own documentation runs it, on the same model, batch and optimizer; needs the extra
`peers`.

Its noise is torch's ordinary generator (`secure_mode` off, its default), where the private methods
here draw theirs from ChaCha20.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grape_ray.bench.models import Loss
from grape_ray.bench.paid import NOISE_MULTIPLIER
from grape_ray.storage import Json

LEARNING_RATE, CLIP_NORM = 1e-4, 1.0  # as in candidates
_BY_HOOKS = ("opacus.grad_sample", "GradSampleModule"), ("opacus.optimizers", "DPOptimizer")
_BY_GHOST = (
    ("opacus.grad_sample", "GradSampleModuleFastGradientClipping"),
    ("opacus.optimizers", "DPOptimizerFastGradientClipping"),
)


def hooks(model: nn.Module, loss: Loss, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Per-example gradients by hooks (Opacus's default)."""
    wrapped, optimizer = _wrap(model, batch, _BY_HOOKS, {})

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(wrapped, batch).mean().backward()
        optimizer.step()

    return step


def ghost(model: nn.Module, loss: Loss, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Ghost clipping: norms in a first backward pass, the sum in a second one."""
    wrapped, optimizer = _wrap(
        model, batch, _BY_GHOST, {"max_grad_norm": CLIP_NORM, "use_ghost_clipping": True}
    )
    tensor = importlib.import_module(
        "opacus.utils.fast_gradient_clipping_utils"
    ).DPTensorFastGradientClipping

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        tensor(wrapped, optimizer, loss(wrapped, batch), "mean").backward()
        optimizer.step()

    return step


def _wrap(
    model: nn.Module, batch: dict[str, Tensor], kinds: tuple, options: Json
) -> tuple[Any, Any]:
    """Opacus's module and optimizer; its hooks record in training mode alone, and the models here
    have no dropout.
    """
    logging.disable(logging.WARNING)
    module, optimizer = (getattr(importlib.import_module(place), name) for place, name in kinds)
    wrapped = module(model.train(), loss_reduction="mean", strict=False, **options)
    inner = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    rows = len(batch["labels"])
    return wrapped, optimizer(
        inner, noise_multiplier=NOISE_MULTIPLIER, max_grad_norm=CLIP_NORM, expected_batch_size=rows,
        loss_reduction="mean"
    )  # fmt: skip
