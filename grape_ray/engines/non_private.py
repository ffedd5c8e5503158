"""The non-private baseline: plain autograd over the micro-batch; no clip, no noise, no proof."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grape_ray.engines.capture.batches import Batch, count_examples
from grape_ray.engines.engine import Engine
from grape_ray.engines.grouping import Groups
from grape_ray.engines.losses import PerExampleLoss, check_losses
from grape_ray.privacy.types import ClippedSum


class NonPrivate(Engine):
    """Sums of ordinary gradients; its `sensitivity` is infinite, so that no noise could ever cover
    it.
    """

    private = False

    def clipped_sum(
        self,
        per_example_loss: PerExampleLoss,
        batch: Batch,
        step: int = 0,
        mask: Tensor | None = None,
        groups: Tensor | None = None,
        units: int | None = None,
    ) -> ClippedSum:
        rows = count_examples(batch)
        if rows == 0:
            return self.empty_sum(step)
        with torch.enable_grad():
            losses = check_losses(per_example_loss(self.model, batch), rows)
            means = losses
            if groups is not None:
                means = losses * Groups(groups, units, rows, losses.device).shares
                mask = None if mask is None else mask[groups]
            total = means.sum() if mask is None else means[mask].sum()
            found = torch.autograd.grad(total, list(self.params.values()), allow_unused=True)
        sums = {name: grad for name, grad in zip(self.params, found) if grad is not None}
        return self._complete(sums, {"losses": losses.detach()}, step)

    def _complete(
        self, sums: dict[str, Tensor], unprotected: dict[str, Tensor], step: int | None
    ) -> ClippedSum:
        return replace(super()._complete(sums, unprotected, step), sensitivity=float("inf"))
