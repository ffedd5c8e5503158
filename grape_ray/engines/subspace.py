"""Subspaces in which weights are trained: which side of a weight is compressed, the matrix that
does it, and the lift back.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from grape_ray.errors import ConfigError
from grape_ray.privacy.random_streams import public_normals


@dataclass(frozen=True)
class Projection:
    """How one weight, seen as a matrix (d0, d1), is compressed: d0 is its first dimension that is
    not 1, d1 all later ones.

    Attributes:
        axis: the compressed side, 0 or 1. dim: its length. other: the other side's length. rank:
            coordinates left of it.
    """

    axis: int
    dim: int
    other: int
    rank: int

    @property
    def rows(self) -> int:
        """d0 of the matrix view: `weight.view(rows, -1)`."""
        return self.dim if self.axis == 0 else self.other

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the coordinates: (rank, d1) for axis 0, (d0, rank) for axis 1."""
        return (self.rank, self.other) if self.axis == 0 else (self.other, self.rank)


class Subspace:
    """The identity on every tensor that `plan` does not name; a base for those that project.

    Args:
        plan: parameter name -> Projection. refresh: steps between new matrices; 0 never.
    """

    def __init__(self, plan: Mapping[str, Projection] | None = None, refresh: int = 0):
        self.plan, self.refresh = dict(plan or {}), refresh

    def period(self, step: int) -> int:
        """The number of the projection period that `step` lies in."""
        return step // self.refresh if self.refresh else 0

    def matrix(self, name: str, period: int, like: Tensor) -> Tensor:
        """The projection (dim, rank) of weight `name` in `period`, on the device of `like`, fp32
        (fp64 beside fp64 weights).
        """
        raise NotImplementedError

    def part(self, name: str) -> str:
        """The tensor of a sum or a gradient that holds the coordinates of weight `name`: one of its
        own, unless all weights have their coordinates in common.
        """
        return name

    def project(self, name: str, gradient: Tensor, period: int) -> Tensor:
        """The coordinates of a released gradient; the identity where the gradient came in
        coordinates already.
        """
        return gradient

    def change_of_basis(self, name: str, old: int, new: int, like: Tensor) -> Tensor:
        """(rank, rank): coordinates @ it moves what was lifted by the old matrix onto the new one;
        see Optimizer, `transfer`.
        """
        plan = self.plan[name]
        # R^T R is dim / rank times the identity in expectation, so this is its inverse
        return (self.matrix(name, old, like).T @ self.matrix(name, new, like)) * (
            plan.rank / plan.dim
        )

    def state_dict(self) -> dict[str, Tensor]:
        """What cannot be made anew from keys; nothing here."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restores `state_dict`."""

    def matrix_rows(self, name: str, period: int, like: Tensor, rows: slice) -> Tensor:
        """The rows of `matrix`, made alone where that is cheaper."""
        return self.matrix(name, period, like)[rows]

    def lift_(
        self,
        weight: Tensor,
        name: str,
        period: int,
        coords: Tensor,
        alpha: float,
        rows: slice = slice(None),
    ) -> None:
        """weight += alpha * (coords lifted to the weight's shape), in place and without a full-size
        temporary.

        Args:
            weight: rows `rows` of the whole one. coords: its coordinates; those rows alone where
                axis 1 is compressed.
        """
        plan = self.plan.get(name)
        if plan is None:
            weight.add_(coords.to(weight.dtype), alpha=alpha)
            return
        compressed = rows if plan.axis == 0 else slice(None)
        matrix, coords = (
            self.matrix_rows(name, period, weight, compressed).to(weight.dtype),
            coords.to(weight.dtype),
        )
        left, right = (matrix, coords) if plan.axis == 0 else (coords, matrix.T)
        weight.view(left.shape[0], right.shape[1]).addmm_(left, right, alpha=alpha)


class Gaussian(Subspace):
    """The DP-GRAPE projection: entries from N(0, 1/rank), a function of (public key, weight's name,
    period), never stored.

    Norms are kept in expectation and the lift is unbiased: E[R R^T] = I. It depends on nothing
    private, and the clip comes after it, so the sensitivity is the clip norm whatever the matrix
    holds (docs/privacy.md). `scale="paper"` draws from N(0, 1/rank^2), as the authors' public code
    does.

    Args:
        cache_bytes: the current period's matrices are kept up to this size and made anew beyond it.
    """

    def __init__(
        self,
        plan: Mapping[str, Projection],
        key: bytes,
        refresh: int,
        scale: str = "unbiased",
        cache_bytes: int = 1 << 28,
    ):
        super().__init__(plan, refresh)
        self._key, self._scale = key, scale
        self._cache: dict[str, tuple[int, Tensor]] = {}
        total = sum(4 * p.dim * p.rank for p in self.plan.values())
        self._cached = total <= cache_bytes

    def matrix(self, name: str, period: int, like: Tensor) -> Tensor:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        held = self._cache.get(name)
        if (
            held is not None
            and held[0] == period
            and held[1].device == like.device
            and held[1].dtype == dtype
        ):
            return held[1]
        matrix = self._draw(name, period, slice(None), like.device).to(dtype)
        if self._cached:
            self._cache[name] = (period, matrix)
        return matrix

    def matrix_rows(self, name: str, period: int, like: Tensor, rows: slice) -> Tensor:
        if self._cached:
            return self.matrix(name, period, like)[rows]
        drawn = self._draw(name, period, rows, like.device)
        return drawn.double() if like.dtype == torch.float64 else drawn

    def _draw(self, name: str, period: int, rows: slice, device: torch.device) -> Tensor:
        plan = self.plan[name]
        std = 1 / plan.rank if self._scale == "paper" else 1 / math.sqrt(plan.rank)
        drawn = public_normals(self._key, name, period, (plan.dim, plan.rank), rows, device)
        return drawn.mul_(std)


class Svd(Subspace):
    """GaLore's subspace (Zhao et al. 2024): leading singular vectors of the PRIVATE gradient at the
    start of each period.

    It looks only at released gradients, so it is post-processing and costs no privacy.
    """

    def __init__(self, plan: Mapping[str, Projection], refresh: int):
        super().__init__(plan, refresh)
        self._matrices: dict[str, tuple[int, Tensor]] = {}
        self._before: dict[str, Tensor] = {}

    def matrix(self, name: str, period: int, like: Tensor) -> Tensor:
        held, matrix = self._matrices[name]
        return matrix if held == period else self._before[name]

    def project(self, name: str, gradient: Tensor, period: int) -> Tensor:
        plan = self.plan.get(name)
        if plan is None:
            return gradient
        flat = gradient.view(plan.rows, -1)
        if name not in self._matrices or self._matrices[name][0] != period:
            if name in self._matrices:
                # moments are moved over from it, once
                self._before[name] = self._matrices[name][1]
            left, _, right = torch.linalg.svd(flat, full_matrices=False)
            self._matrices[name] = (
                period,
                (left[:, : plan.rank] if plan.axis == 0 else right[: plan.rank].T).contiguous(),
            )
        matrix = self._matrices[name][1]
        return matrix.T @ flat if plan.axis == 0 else flat @ matrix

    def change_of_basis(self, name: str, old: int, new: int, like: Tensor) -> Tensor:
        return self._before[name].T @ self._matrices[name][1]

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"subspace/{period}/{name}": matrix for name, (period, matrix) in self._matrices.items()
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        for key, value in state.items():
            if key.startswith("subspace/") and isinstance(value, Tensor):
                _, period, name = key.split("/", 2)
                self._matrices[name] = (int(period), value)


def plan_projections(
    model: nn.Module, rank: int, side: str = "in", dense: Iterable[str] = (), min_numel: int = 4096
) -> dict[str, Projection]:
    """Which trainable weights are projected and on which side.

    Weights with two or more dimensions longer than 1 and at least `min_numel` elements are
    projected, unless their name matches a pattern of `dense`. Embedding tables are always
    compressed on the vocabulary side; `side` decides for the rest (config.Method).

    Raises:
        ConfigError: the rank is not below the compressed side of a weight that should be projected.
    """
    plan, patterns = {}, tuple(dense)
    for name, (owner, param) in owned_parameters(model).items():
        if (
            param.ndim < 2
            or param.numel() < min_numel
            or any(fnmatch.fnmatch(name, p) for p in patterns)
        ):
            continue
        leading = next((n for n in param.shape if n != 1), 1)
        sides = (leading, param.numel() // leading)
        if 1 in sides:  # a vector, whatever its number of dimensions
            continue
        axis = _axis(owner, sides, side)
        if rank >= sides[axis]:
            raise ConfigError(
                f"method.rank for layer '{name}' of shape {tuple(param.shape)}",
                rank,
                f"a rank below {sides[axis]}, the side it compresses",
                "lower method.rank, raise method.project_min_numel, or name the layer in"
                " method.dense",
            )
        plan[name] = Projection(axis, sides[axis], sides[1 - axis], rank)
    return plan


def _axis(owner: nn.Module, sides: tuple[int, int], side: str) -> int:
    """The compressed axis of a weight held by `owner`."""
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return 0
    if side == "smaller":
        return 0 if sides[0] < sides[1] else 1
    inputs = 0 if type(owner).__name__ == "Conv1D" else 1  # GPT-2 stores (in, out)
    return inputs if side == "in" else 1 - inputs


def owned_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Trainable parameters by their first name, with the module that holds them; a tied tensor
    appears once, an empty one never.
    """
    found, seen = {}, set()
    for prefix, module in model.named_modules():
        for local, param in module._parameters.items():
            if param is not None and is_lazy(param):
                name = f"{prefix}.{local}" if prefix else local
                raise ConfigError(
                    f"parameter '{name}'",
                    "no shape yet",
                    "a lazy layer that has met a batch",
                    "run the model once",
                )
            if (
                param is not None
                and param.requires_grad
                and param.numel()
                and id(param) not in seen
            ):
                seen.add(id(param))
                found[f"{prefix}.{local}" if prefix else local] = (module, param)
    return found
