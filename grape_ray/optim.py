"""Optimizers over coordinates: moments live where the gradient lives, and the update is lifted onto
the weight in place.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grape_ray.config.methods import METHODS
from grape_ray.config.schema import Method
from grape_ray.distributed import sharding
from grape_ray.engines import Engine
from grape_ray.engines.collector import sum_dtype
from grape_ray.engines.directions import Directions
from grape_ray.engines.subspace import Subspace, Svd, plan_projections
from grape_ray.errors import CheckpointError, GrapeRayError
from grape_ray.privacy.random_streams import public_bits
from grape_ray.privacy.types import NonPrivateGradient, PrivateGradient, step_of

_BLOCK = 1 << 20  # entries of a bfloat16 weight that are moved at a time


def learning_rate(method: Method, step: int, total_steps: int) -> float:
    """The rate at `step` (0-based): linear warm-up, then the schedule's decay to zero at
    `total_steps`.

    >>> method = Method(learning_rate=1.0, warmup_steps=2, schedule="linear")
    >>> [learning_rate(method, step, total_steps=6) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < method.warmup_steps:
        return method.learning_rate * (step + 1) / method.warmup_steps
    if method.schedule == "constant":
        return method.learning_rate
    done = (step - method.warmup_steps) / max(total_steps - method.warmup_steps, 1)
    left = 1 - min(done, 1.0)
    return method.learning_rate * (
        left if method.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
    )


class Recorder(Protocol):
    """Follows how projected weights move: `W <- decay W + alpha lift(update)`."""

    def begin_step(self, period: int, decay: float) -> None:
        """Before the weights of a step move: the period of its subspace, and its weight decay."""
        ...

    def record(self, name: str, period: int, update: Tensor, alpha: float) -> None:
        """One projected weight's move; `update` is in coordinates and may not be kept."""
        ...


class Optimizer:
    """Adam or SGD with decoupled weight decay (Loshchilov and Hutter 2019) on released gradients.

    Of a sharded parameter each rank keeps the moments of, and updates, the rows that it holds.
    Weights in bfloat16 are updated in fp32 and rounded stochastically, with public bits that depend
    on (key, name, step) alone: plain rounding would lose small updates.

    Args:
        params: parameter name -> Parameter, changed in place. subspace: the one that the gradients
            come from.
        method: rates, betas, the moment policy at a refresh. total_steps: where the schedule ends.
            rounding_key: any public bytes.

    Raises:
        ConfigError: the method keeps moments, and the subspace is of random directions.

    Attributes:
        recorder: given every move of a projected weight; None records nothing.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        subspace: Subspace,
        method: Method,
        total_steps: int,
        rounding_key: bytes = b"",
    ):
        if isinstance(subspace, Directions):
            method.require_plain_sgd()
        self.params = dict(params)
        self.subspace = subspace
        self.method = method
        self.total_steps = total_steps
        self.updates, self._period, self._rounding_key = 0, 0, rounding_key
        self._multiples = {
            name: multiple
            for pattern, multiple in method.rate_multiples
            for name in fnmatch.filter(self.params, pattern)
        }
        self._rows = {name: self._rows_of(name, param) for name, param in self.params.items()}
        self.recorder: Recorder | None = None
        slots = (
            ("first", "second")
            if method.optimizer_name == "adam"
            else ("first",)
            if method.momentum
            else ()
        )
        self._state: dict[str, dict[str, Tensor]] = {slot: {} for slot in slots}
        # projected weights whose first moment has their own shape
        lifted = method.moments == "lifted" and "first" in slots
        self._lifted = frozenset(subspace.plan) if lifted else frozenset[str]()
        for name, param in self.params.items():
            plan, like = subspace.plan.get(name), sharding.local(param)
            shape = plan.shape if plan else like.shape
            if plan and plan.axis == 1:
                shape = (self._rows[name].stop - self._rows[name].start, plan.rank)
            for slot in slots:
                self._state[slot][name] = torch.zeros(
                    like.shape if slot == "first" and name in self._lifted else shape,
                    dtype=sum_dtype(param),
                    device=like.device,
                )

    def _rows_of(self, name: str, param: Tensor) -> slice:
        """The rows of the weight, seen as a matrix, that this rank updates."""
        plan = self.subspace.plan.get(name)
        held = sharding.rows(param) if param.ndim else slice(0, 1)
        if plan is None or plan.rows == param.shape[0]:
            return held
        # (1, d0, ...): one rank holds it all
        return slice(0, plan.rows if sharding.local(param).numel() else 0)

    def step(self, gradient: PrivateGradient | NonPrivateGradient, step: int | None = None) -> None:
        """One update, of the step that the gradient carries.

        Args:
            step: that step, or nothing.

        Raises:
            GrapeRayError: `gradient` did not come through the noise line (or method `none`), it is
                of another step than `step`, or its coordinates are of another period of projections
                than that in which they would be lifted.
        """
        if not isinstance(gradient, (PrivateGradient, NonPrivateGradient)):
            raise GrapeRayError(
                "the optimizer's gradient",
                type(gradient).__name__,
                "a PrivateGradient",
                "pass the clipped sum through noise.privatize",
            )
        step = step_of(gradient, step)
        period = self.subspace.period(step)
        rate = learning_rate(self.method, step, self.total_steps)
        if gradient.period not in (None, period):
            fix = "take subspace and refresh of engine and optimizer from one config"
            raise GrapeRayError(
                "the projections of a gradient",
                f"period {gradient.period}",
                f"period {period} of step {step}",
                fix,
            )
        self.updates += 1
        decay = 1 - rate * self.method.weight_decay
        if self.recorder:
            self.recorder.begin_step(period, decay)
        with torch.no_grad():
            for name, param in self.params.items():
                released = gradient.tensors[self.subspace.part(name)]
                coords = self.subspace.project(name, released, period)
                if period != self._period and name in self.subspace.plan:
                    self._refresh(name, self._period, period)
                mine = self._mine(name, param, coords)
                update = self._direction(name, mine, gradient.noise_std, self._averaged(name, step))
                moves = -rate * self._multiples.get(name, 1.0)
                if self.recorder and name in self.subspace.plan:
                    self.recorder.record(name, period, update, moves)
                self._apply(name, sharding.local(param), update, moves, decay, step)
        self._period = period

    def _mine(self, name: str, param: Tensor, coords: Tensor) -> Tensor:
        """What this rank needs of a gradient: its rows, or all coordinates where the rows are what
        is compressed.
        """
        plan = self.subspace.plan.get(name)
        if sharding.local(param).shape == param.shape or (plan is not None and plan.axis == 0):
            return coords
        return coords[self._rows[name]]

    def _apply(
        self, name: str, weight: Tensor, update: Tensor, moves: float, decay: float, step: int
    ) -> None:
        """weight <- decay * weight + moves * (lifted update), in the weight's own memory."""
        period, rows = self.subspace.period(step), self._rows[name]
        if name in self._lifted:
            first = self._state["first"][name]
            adam = self.method.optimizer_name == "adam"
            kept = self.method.betas[0] if adam else self.method.momentum
            taken = 1 - kept if adam else 1.0
            self.subspace.lift_(first.mul_(kept), name, period, update, taken, rows)
            update = first
            moves = moves / (1 - kept**self.updates) if adam else moves

        def move(exact: Tensor, rows: slice, update: Tensor) -> None:
            if decay != 1:
                exact.mul_(decay)
            if name in self._lifted:
                exact.add_(update, alpha=moves)
            else:
                self.subspace.lift_(exact, name, period, update, moves, rows)

        if weight.dtype != torch.bfloat16:
            move(weight, rows, update)
        elif weight.numel():
            self._round_by_blocks(name, weight, update, step, move)

    def _round_by_blocks(
        self,
        name: str,
        weight: Tensor,
        update: Tensor,
        step: int,
        move: Callable[[Tensor, slice, Tensor], None],
    ) -> None:
        """Moves a bfloat16 weight in fp32 and rounds it, by blocks of rows: what is made beside it
        is some blocks large, whatever the weight is.

        Args:
            move: moves rows of the weight in fp32, given their places and what belongs to them of
                `update`.
        """
        plan, held = self.subspace.plan.get(name), self._rows[name]
        count = held.stop - held.start
        matrix = weight.contiguous().view(count, -1)
        whole = self.params[name].numel() // matrix.shape[1], matrix.shape[1]
        by_rows = name in self._lifted or plan is None or plan.axis == 1
        update = update.reshape(count, -1) if by_rows else update
        size = max(_BLOCK // matrix.shape[1], 1)
        for low in range(0, count, size):
            high = min(low + size, count)
            rows = slice(held.start + low, held.start + high)
            exact = matrix[low:high].float()
            move(exact, rows, update[low:high] if by_rows else update)
            bits = public_bits(self._rounding_key, name, step, whole, rows, weight.device)
            matrix[low:high] = round_stochastically(exact, bits)
            if weight.is_meta:  # of shapes alone one block says what all do
                break
        if not weight.is_contiguous():
            weight.copy_(matrix.view(weight.shape))

    def _averaged(self, name: str, step: int) -> int:
        """The number of gradients that the first moment of a tensor is a mean of, with that of
        `step`.
        """
        refresh = self.subspace.refresh
        if self.method.moments != "reset" or not refresh or name not in self.subspace.plan:
            return self.updates
        return min(self.updates, step % refresh + 1)

    def _direction(self, name: str, grad: Tensor, noise_std: float, averaged: int) -> Tensor:
        """The direction in coordinates, of which a lifted mean is yet to be taken; may reuse the
        gradient's memory.
        """
        lifted = name in self._lifted
        if self.method.optimizer_name == "sgd":
            if lifted or not self.method.momentum:
                return grad
            return self._state["first"][name].mul_(self.method.momentum).add_(grad)
        beta1, beta2 = self.method.betas
        second = self._state["second"][name]
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        unbiased = second / (1 - beta2**self.updates)
        if self.method.correct_noise_bias:  # in coordinates the noise variance is known exactly
            unbiased = unbiased.sub_(noise_std**2).clamp_(min=0)
        scale = unbiased.sqrt_().add_(self.method.eps).reciprocal_()
        if lifted:
            return scale.mul_(grad)
        first = self._state["first"][name].lerp_(grad, 1 - beta1)
        return scale.mul_(first).div_(1 - beta1**averaged)

    def _refresh(self, name: str, old: int, new: int) -> None:
        """Applies the moment policy where the projection changes; second moments move by the
        squared change of basis.
        """
        if self.method.moments in ("keep", "lifted"):
            return
        if self.method.moments == "reset":
            # the law of squared coordinates is the same in any basis
            if "first" in self._state:
                self._state["first"][name].zero_()
            return
        for slot, tensors in self._state.items():
            change = self.subspace.change_of_basis(name, old, new, tensors[name])
            # squares of coordinates, as if these were uncorrelated
            change = change.square() if slot == "second" else change
            tensors[name] = (
                change.T @ tensors[name]
                if self.subspace.plan[name].axis == 0
                else tensors[name] @ change
            )

    def places(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Of the tensors of `state_dict` of which this rank holds some rows alone: (shape of the
        whole, first row).
        """
        found = {}
        for name, param in self.params.items():
            plan = self.subspace.plan.get(name)
            if not isinstance(param, DTensor):
                continue
            for slot in self._state:
                if plan is None or (slot == "first" and name in self._lifted):
                    shape = param.shape
                elif plan.axis == 1:
                    shape = plan.shape
                else:  # every rank has all of them
                    continue
                found[f"{slot}/{name}"] = (tuple(shape), self._rows[name].start)
        return found

    def state_dict(self) -> dict[str, Tensor | int]:
        """`<slot>/<name>` -> tensor, and the counters `updates` and `period` as ints."""
        tensors = {
            f"{slot}/{name}": t for slot, named in self._state.items() for name, t in named.items()
        }
        return {
            **tensors,
            **self.subspace.state_dict(),
            "updates": self.updates,
            "period": self._period,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`. Raises CheckpointError where a tensor is missing or has another
        shape.
        """
        for slot, named in self._state.items():
            for name, mine in named.items():
                saved = state.get(f"{slot}/{name}")
                if saved is None or saved.shape != mine.shape:
                    got = "none" if saved is None else tuple(saved.shape)
                    raise CheckpointError(
                        f"optimizer state {slot} of '{name}'",
                        got,
                        f"shape {tuple(mine.shape)}",
                        "resume with the run's own config",
                    )
                mine.copy_(saved)
        self.subspace.load_state_dict(state)
        self.updates, self._period = int(state["updates"]), int(state["period"])


def round_stochastically(exact: Tensor, bits: Tensor) -> Tensor:
    """fp32 as bfloat16, up or down with probabilities that keep the mean; spends `exact`.

    Args:
        bits: int16, uniform, of the same shape: 2^15 more, in [0, 2^16), is added below the kept
            half of each number before the rest is cut off.
    """
    raised = exact.view(torch.int32).add_(bits).add_(1 << 15)
    return raised.bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def make_optimizer(
    model: nn.Module, engine: Engine, method: Method, total_steps: int, rounding_key: bytes = b""
) -> Optimizer:
    """The optimizer that goes with an engine: in its subspace, or for DP-GaLore in one found from
    the private gradients.
    """
    subspace = engine.subspace
    if METHODS[method.name].subspace == "svd":
        subspace = Svd(
            plan_projections(
                model, method.rank, method.side, method.dense, method.project_min_numel
            ),
            method.refresh_steps,
        )
    return Optimizer(engine.params, subspace, method, total_steps, rounding_key)
