"""Optimizers over coordinates: moments live where the gradient lives, and the update is lifted onto the weight in place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from grape_ray.config import Method
from grape_ray.engines import Engine
from grape_ray.engines.sink import sum_dtype
from grape_ray.errors import CheckpointError, GrapeRayError
from grape_ray.methods import METHODS
from grape_ray.subspace import Subspace, Svd, plan_projections
from grape_ray.types import NonPrivateGradient, PrivateGradient


def learning_rate(method: Method, step: int, total_steps: int) -> float:
    """The rate at `step` (0-based): linear warm-up, then the schedule's decay to zero at `total_steps`."""
    if step < method.warmup_steps:
        return method.learning_rate * (step + 1) / method.warmup_steps
    if method.schedule == "constant":
        return method.learning_rate
    done = (step - method.warmup_steps) / max(total_steps - method.warmup_steps, 1)
    left = 1 - min(done, 1.0)
    return method.learning_rate * (left if method.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


class Recorder(Protocol):
    """Told how projected weights move: `W <- decay W + alpha lift(update)`."""

    def begin_step(self, period: int, decay: float) -> None:
        """Before the weights of a step move: the period of its subspace, and its weight decay."""
        ...

    def record(self, name: str, period: int, update: Tensor, alpha: float) -> None:
        """One projected weight's move; `update` is in coordinates and may not be kept."""
        ...


class Optimizer:
    """Adam or SGD with decoupled weight decay (Loshchilov and Hutter 2019) on released gradients.

    Args:
        params: parameter name -> Parameter, changed in place. subspace: the one that the gradients come from.
        method: rates, betas, the moment policy at a refresh. total_steps: where the schedule ends.

    Attributes:
        recorder: told of every move of a projected weight; None tells nobody.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], subspace: Subspace, method: Method, total_steps: int):
        self.params, self.subspace, self.method, self.total_steps = dict(params), subspace, method, total_steps
        self.updates, self._period = 0, 0
        self.recorder: Recorder | None = None
        slots = ("first", "second") if method.optimizer == "adam" else ("first",) if method.momentum else ()
        self._state: dict[str, dict[str, Tensor]] = {slot: {} for slot in slots}
        for name, param in self.params.items():
            plan = subspace.plan.get(name)
            for slot in slots:
                self._state[slot][name] = torch.zeros(plan.shape if plan else param.shape, dtype=sum_dtype(param), device=param.device)

    def step(self, gradient: PrivateGradient | NonPrivateGradient, step: int) -> None:
        """One update. Raises GrapeRayError for anything that did not come through the noise line (or method `none`)."""
        if not isinstance(gradient, (PrivateGradient, NonPrivateGradient)):
            raise GrapeRayError(
                "the optimizer's gradient", type(gradient).__name__, "a PrivateGradient", "pass the clipped sum through noise.privatize"
            )
        period, rate = self.subspace.period(step), learning_rate(self.method, step, self.total_steps)
        self.updates += 1
        if self.recorder:
            self.recorder.begin_step(period, 1 - rate * self.method.weight_decay)
        with torch.no_grad():
            for name, param in self.params.items():
                coords = self.subspace.project(name, gradient.tensors[name], period)
                if period != self._period and name in self.subspace.plan:
                    self._refresh(name, self._period, period)
                update = self._direction(name, coords, gradient.noise_std)
                if self.method.weight_decay:
                    param.mul_(1 - rate * self.method.weight_decay)
                if self.recorder and name in self.subspace.plan:
                    self.recorder.record(name, period, update, -rate)
                self.subspace.lift_(param.data, name, period, update, -rate)
        self._period = period

    def _direction(self, name: str, grad: Tensor, noise_std: float) -> Tensor:
        """The direction in coordinates; may reuse the gradient's memory."""
        if self.method.optimizer == "sgd":
            if not self.method.momentum:
                return grad
            return self._state["first"][name].mul_(self.method.momentum).add_(grad)
        beta1, beta2 = self.method.betas
        first, second = self._state["first"][name], self._state["second"][name]
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        unbiased = second / (1 - beta2**self.updates)
        if self.method.correct_noise_bias:  # in coordinates the noise variance is known exactly
            unbiased = unbiased.sub_(noise_std**2).clamp_(min=0)
        return unbiased.sqrt_().add_(self.method.eps).reciprocal_().mul_(first).div_(1 - beta1**self.updates)

    def _refresh(self, name: str, old: int, new: int) -> None:
        """Applies the moment policy where the projection changes; second moments move by the squared change of basis."""
        if self.method.moments == "keep":
            return
        for slot, tensors in self._state.items():
            if self.method.moments == "reset":
                tensors[name].zero_()
                continue
            change = self.subspace.change_of_basis(name, old, new, tensors[name])
            change = change.square() if slot == "second" else change
            tensors[name] = change.T @ tensors[name] if self.subspace.plan[name].axis == 0 else tensors[name] @ change

    def state_dict(self) -> dict[str, Any]:
        """`<slot>/<name>` -> tensor, and the counters `updates` and `period` as ints."""
        tensors = {f"{slot}/{name}": t for slot, named in self._state.items() for name, t in named.items()}
        return {**tensors, **self.subspace.state_dict(), "updates": self.updates, "period": self._period}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`. Raises CheckpointError where a tensor is missing or has another shape."""
        for slot, named in self._state.items():
            for name, mine in named.items():
                saved = state.get(f"{slot}/{name}")
                if saved is None or saved.shape != mine.shape:
                    got = "none" if saved is None else tuple(saved.shape)
                    raise CheckpointError(
                        f"optimizer state {slot} of '{name}'", got, f"shape {tuple(mine.shape)}", "resume with the run's own config"
                    )
                mine.copy_(saved)
        self.subspace.load_state_dict(state)
        self.updates, self._period = int(state["updates"]), int(state["period"])


def make_optimizer(model: nn.Module, engine: Engine, method: Method, total_steps: int) -> Optimizer:
    """The optimizer that goes with an engine: in its subspace, or for DP-GaLore in one found from the private gradients."""
    subspace = engine.subspace
    if METHODS[method.name].subspace == "svd":
        subspace = Svd(plan_projections(model, method.rank, method.side, method.dense, method.project_min_numel), method.refresh)
    return Optimizer(engine.params, subspace, method, total_steps)
