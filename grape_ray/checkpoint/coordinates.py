"""Delta checkpoints: how far projected weights have moved since a full checkpoint, in coordinates.

Within a projection period p a step changes a weight by W <- c W + lift_p(a u): c is its weight
decay and u the update in coordinates. So since a full checkpoint W_0 of it, W = f W_0 + sum_p f_p
lift_p(S_p), and the sums S_p, which are of the coordinates' size, with the numbers f hold all of
the change; the projections come anew from their public key. Rounding apart, which the tests bound
by 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grape_ray.engines.subspace import Subspace
from grape_ray.privacy.random_streams import STREAMS
from grape_ray.storage import Json

# Beyond either the next checkpoint is a full one: a delta would no longer be small, or differ by
# more than 1e-6, since the rounding of the steps themselves, which a delta does not repeat, adds
# up.
MAX_PERIODS, MAX_STEPS = 4, 500


class Coordinates:
    """The change of every projected weight since the full checkpoint `base`; nothing is kept while
    there is none.

    Costs one tensor of the coordinates' size a weight beside the weights, and as much host memory
    for each earlier period.

    Attributes:
        base: name of the full checkpoint, or None. deltas: how many deltas of it were made.
    """

    def __init__(self, subspace: Subspace):
        self._subspace = subspace
        self._clear(None)

    def _clear(self, base: str | None) -> None:
        self.base, self.deltas, self._steps = base, 0, 0
        self._factor, self._factors = 1.0, dict[int, float]()
        self._sums: dict[int, dict[str, Tensor]] = {}

    def restart(self, base: str) -> None:
        """From now on changes are counted from this full checkpoint."""
        self._clear(base)

    def forget(self) -> None:
        """Nothing is counted until the next full checkpoint."""
        self._clear(None)

    def begin_step(self, period: int, decay: float) -> None:
        """Before the records of a step: every weight is multiplied by `decay`, then moves in the
        subspace of `period`.
        """
        if self.base is None:
            return
        self._steps += 1
        if self._steps > MAX_STEPS or (period not in self._sums and len(self._sums) == MAX_PERIODS):
            self._clear(None)
            return
        if period not in self._sums:
            # Sums of earlier periods are only read again: they need no device memory.
            for earlier in self._sums.values():
                earlier.update({name: tensor.cpu() for name, tensor in earlier.items()})
            self._sums[period], self._factors[period] = {}, 1.0
        # as it is rounded before fp32 weights are multiplied: each step alike
        decay = float(torch.tensor(decay, dtype=torch.float32))
        self._factor *= decay
        for known in self._factors:
            self._factors[known] *= decay

    def record(self, name: str, period: int, update: Tensor, alpha: float) -> None:
        """A projected weight moved by alpha * lift(update)."""
        if self.base is None:
            return
        sums, factor = self._sums[period], self._factors[period]
        if name not in sums:
            sums[name] = torch.zeros_like(update)
        # divided by f_p, which multiplies the whole sum
        sums[name].add_(update, alpha=alpha / factor)

    def tensors(self) -> dict[str, Tensor]:
        """`<period>/<weight>` -> sum of coordinates."""
        return {
            f"{period}/{name}": tensor
            for period, named in self._sums.items()
            for name, tensor in named.items()
        }

    def counters(self) -> Json:
        """The numbers that go with `tensors`: f (`factor`), f_p (`factors`), how many deltas and
        steps there were since the full checkpoint, and which projections they are of (`streams`).
        """
        return {
            "streams": STREAMS,
            "factor": self._factor,
            "factors": {str(p): f for p, f in self._factors.items()},
            "deltas": self.deltas,
            "steps": self._steps,
        }

    def load(
        self, base: str, tensors: Mapping[str, Tensor], counters: Json, like: Mapping[str, Tensor]
    ) -> None:
        """Continues from a delta's sums, so that later deltas start from the same full checkpoint.

        Args:
            base: name of the full checkpoint. tensors, counters: what `tensors` and `counters`
                gave. like: the weights, by name, on whose devices the sums are needed.
        """
        self._clear(base)
        self.deltas = int(counters["deltas"])
        self._steps = int(counters["steps"])
        self._factor = float(counters["factor"])
        self._factors = {int(p): float(f) for p, f in counters["factors"].items()}
        self._sums = {period: {} for period in self._factors}
        newest = max(self._sums, default=0)
        for key, tensor in tensors.items():
            period, name = key.split("/", 1)
            self._sums[int(period)][name] = (
                tensor.to(like[name].device) if int(period) == newest else tensor
            )

    def apply_(self, weights: Mapping[str, Tensor]) -> None:
        """Moves the base's weights, in place, to where the sums say that they are."""
        for name in sorted({name for named in self._sums.values() for name in named}):
            weight = weights[name]
            # f first: the sums f_p S_p are of what was added afterwards
            weight.mul_(self._factor)
            for period, named in self._sums.items():
                if name in named:
                    self._subspace.lift_(
                        weight, name, period, named[name].to(weight.device), self._factors[period]
                    )
