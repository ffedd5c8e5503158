"""Random directions of all trainable weights together, which slopes are taken along."""

from __future__ import annotations

import math

from torch import Tensor

from grape_ray.engines.subspace import Subspace
from grape_ray.privacy.random_streams import public_normals

SLOPES = "slopes"  # the one tensor of a sum or a gradient: (K,), all weights' coordinates


class Directions(Subspace):
    """K directions with entries from N(0, 1), a function of (public key, weight's name, number,
    period), never stored: made anew for one weight at a time.

    A coordinate is a slope divided by sqrt(K), and is lifted by a direction divided by sqrt(K): as
    DP-GRAPE's projection with entries N(0, 1/K), of the whole model at once. So the K numbers' norm
    is the gradient's, and their lift the gradient, in expectation; K = 1 is a slope as it is. They
    depend on nothing private, and the clip comes after them.

    Source of the entries: the authors' code of DPZero (Zhang et al. 2023), and MeZO (Malladi et al.
    2023); DPZero's theory takes them uniform on the sphere of radius sqrt(d).

    Args:
        count: K. key: any public bytes. refresh: steps between new directions; 0 never.
    """

    def __init__(self, count: int, key: bytes, refresh: int):
        super().__init__(refresh=refresh)
        self.count, self._key = count, key

    @property
    def scale(self) -> float:
        """What slopes, and directions as coordinates are lifted, are multiplied by."""
        return 1 / math.sqrt(self.count)

    def part(self, name: str) -> str:
        return SLOPES

    def direction(self, name: str, number: int, period: int, like: Tensor) -> Tensor:
        """Direction `number` of weight `name` in `period`: shape, device and dtype of `like`, and
        memory of its own.
        """
        rows = like.shape[0] if like.ndim else 1
        label, shape = f"direction {number} of {name}", (rows, like.numel() // rows)
        drawn = public_normals(self._key, label, period, shape, device=like.device)
        return drawn.view(like.shape).to(like.dtype)

    def lift_(
        self,
        weight: Tensor,
        name: str,
        period: int,
        coords: Tensor,
        alpha: float,
        rows: slice = slice(None),
    ) -> None:
        """weight += alpha * (the sum of coordinates (K,) times directions), in place, beside one
        direction of this weight.

        Args:
            rows: all of them; sharded weights are not trained so.
        """
        for number, coordinate in enumerate(coords):
            direction = self.direction(name, number, period, weight).mul_(coordinate)
            weight.add_(direction, alpha=alpha * self.scale)
