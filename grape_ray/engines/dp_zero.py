"""DPZero: a step releases the clipped and noised slopes of the loss along a few public directions;
two forward passes each, and no gradient.

Sources: Zhang et al. 2023, "DPZero: Private Fine-Tuning of Language Models without Backpropagation"
(arXiv 2310.09639); Tang et al. 2024, "Private Fine-tuning of Large Language Models with
Zeroth-order Optimization" (DP-ZO, arXiv 2401.04343). Several slopes of an example are one vector,
clipped by its norm, as in DP-AggZO.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grape_ray.config.schema import Method, Privacy
from grape_ray.engines.algebra.rounding import squared
from grape_ray.engines.capture.batches import Batch, count_examples
from grape_ray.engines.capture.model_state import ModelSnapshot
from grape_ray.engines.capture.parameter_swap import replaced, tracking
from grape_ray.engines.capture.random_state import set_states
from grape_ray.engines.collector import Collector
from grape_ray.engines.directions import SLOPES, Directions
from grape_ray.engines.engine import Engine, not_finite
from grape_ray.engines.grouping import Groups
from grape_ray.engines.losses import PerExampleLoss
from grape_ray.engines.precision import pinned
from grape_ray.engines.verification.forward import Verifier
from grape_ray.errors import ConfigError
from grape_ray.privacy.clipping import factors
from grape_ray.privacy.types import ClippedSum
from grape_ray.storage import Json

# of what rounding explains elsewhere: an example that moves another's loss moves its slope more
_TOLERATED = 0.1
_PRECISE = (torch.float32, torch.float64)


class DpZero(Engine):
    """An example's slopes (l(w + s u_k) - l(w - s u_k)) / (2 s sqrt(K)), k = 1..K, clipped together
    and summed: K numbers, of all trainable weights.

    Memory: that of a forward pass without a graph, one copy of the trainable weights (w + s u, then
    w - s u; the parameters themselves are never written to, so they are bitwise as before), and one
    direction of one weight at a time. Each of the K directions is drawn once in each micro-batch,
    and once more for the update.

    All passes of a sum draw the same random numbers, so a slope is that of the loss with its
    dropout masks held fixed. Each pass is watched, and verified where its sequence of operations is
    new and every so often, as in the other methods (`Verifier`): no example's loss may depend on
    the others. There being no gradient, what is compared are the losses, at the moved weights.

    Args:
        smoothing: s.

    Raises:
        ConfigError: a parameter, trainable or frozen, or an operation, in another precision than
            fp32 or fp64: what one example does to the rounding of the others' losses is divided by
            2 s (docs/privacy.md).
    """

    subspace: Directions

    def __init__(
        self,
        model: nn.Module,
        *,
        smoothing: float = 1e-3,
        subspace: Directions | None = None,
        **common: Any,
    ):
        super().__init__(model, subspace=subspace or Directions(1, b"", refresh=1), **common)
        self.smoothing = smoothing
        self._verifier = Verifier((param.dtype for param in self.params.values()), _TOLERATED)
        for name, param in model.named_parameters():
            if param.dtype not in _PRECISE:
                raise _imprecise(f"parameter '{name}'", str(param.dtype), "set task.weights=fp32")

    @staticmethod
    def options(privacy: Privacy, method: Method) -> Json:
        return {"smoothing": method.smoothing}

    @property
    def coordinates(self) -> int:
        return self.subspace.count

    def _pass(
        self,
        per_example_loss: PerExampleLoss,
        batch: Batch,
        step: int,
        mask: Tensor | None,
        states: list,
        groups: Groups | None,
    ) -> ClippedSum:
        slopes, losses = list[Tensor](), list[Tensor]()
        for number in range(self.subspace.count):
            moved = self._moved(number, step)
            ahead = self._losses_at(moved, per_example_loss, batch, states)
            for name, param in self.params.items():
                moved[name].neg_().add_(param.detach(), alpha=2)  # w - s u, not drawn again
            behind = self._losses_at(moved, per_example_loss, batch, states)
            slopes.append((ahead - behind).div_(2 * self.smoothing))
            losses.append((ahead + behind).div_(2))
        with pinned(losses[0].device.type), torch.no_grad():
            found = torch.stack(slopes, 1).mul_(self.subspace.scale)
            if groups is not None:
                found = groups.summed(found.mul_(groups.shares.unsqueeze(1)))
            return self._clipped(found, losses[0], mask, step)

    def _moved(self, number: int, step: int) -> dict[str, nn.Parameter]:
        """The weights at one end of a direction; frozen, so that no pass keeps a graph."""
        period = self.subspace.period(step)
        found = {}
        for name, param in self.params.items():
            weight = param.detach()
            direction = self.subspace.direction(name, number, period, weight)
            end = direction.mul_(self.smoothing).add_(weight)
            found[name] = nn.Parameter(end, requires_grad=False)
        return found

    def _losses_at(
        self,
        moved: dict[str, nn.Parameter],
        per_example_loss: PerExampleLoss,
        batch: Batch,
        states: list,
    ) -> Tensor:
        """The losses (B,) float64 with weights that were moved, each known to be a function of its
        own example.
        """
        set_states(states)
        with torch.no_grad(), replaced(self.model, self.params, moved):
            snapshot = ModelSnapshot(self.model)

            def new_collector() -> Collector:  # of no gradient
                return Collector({}, count_examples(batch), self.subspace, 0)

            forward, capture = self._watched(
                per_example_loss, batch, states, snapshot, new_collector
            )
            with tracking(self.model, {}, capture, snapshot):
                losses = self._verifier.losses(capture, forward)
        if capture.dependence.half:
            raise _imprecise("the forward pass", "products in half precision", "leave out autocast")
        return losses.double()

    def _clipped(
        self, slopes: Tensor, losses: Tensor, mask: Tensor | None, step: int
    ) -> ClippedSum:
        """The clipped sum of slopes (B, K), of examples or of units."""
        squares = squared(slopes)
        weights = factors({SLOPES: squares}, self.clipping, self.clip_norm, mask)[SLOPES]
        norms = squares.sqrt()
        slopes.index_fill_(0, not_finite(norms), 0.0)
        return self._complete({SLOPES: weights @ slopes}, {"norms": norms, "losses": losses}, step)

    def _complete(
        self, sums: dict[str, Tensor], unprotected: dict[str, Tensor], step: int | None
    ) -> ClippedSum:
        device = next(iter(self.params.values())).device
        zeros = torch.zeros(self.subspace.count, dtype=torch.float64, device=device)
        period = None if step is None else self.subspace.period(step)
        tensors = {SLOPES: sums.get(SLOPES, zeros)}
        return ClippedSum(tensors, self.clip_norm, unprotected, step, period)


def _imprecise(what: str, got: str, fix: str) -> ConfigError:
    expected = "float32 or float64: a slope is a small difference of two losses"
    return ConfigError(f"{what} with method `dp_zero`", got, expected, f"{fix}, or another method")
