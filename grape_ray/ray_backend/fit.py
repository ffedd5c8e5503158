"""Private training of any torch model on any map-style dataset, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.engines.losses import PerExampleLoss
from grape_ray.ray_backend.train import train
from grape_ray.storage import Storage
from grape_ray.tasks.functions import FunctionTask, named
from grape_ray.training.build import newest_checkpoint, trained_model
from grape_ray.training.result import RunResult


@dataclass(frozen=True)
class Fitted:
    """What `fit` gives.

    Attributes:
        model: trained, on the CPU. result: of the run: epsilon, steps, metrics, where its
            checkpoint and its ledger lie.
    """

    model: nn.Module
    result: RunResult


def fit(
    model: nn.Module | Callable[[], nn.Module],
    data: Sequence[object] | Callable[[], Sequence[object]],
    loss: PerExampleLoss,
    *,
    epsilon: float,
    delta: float,
    expected_batch_size: int,
    steps: int,
    validation: Sequence[object] | Callable[[], Sequence[object]] | None = None,
    method: str | Method = "grape",
    clip_norm: float = 1.0,
    learning_rate: float = 1e-3,
    workers: int | str = 0,
    public: bool = False,
    overrides: Sequence[str] = (),
    **options: Any,
) -> Fitted:
    """Trains a model with (epsilon, delta)-differential privacy for each item of a dataset, with
    all that a pipeline's run has: preflight, ledger, checkpoints, resumption.

    Args:
        model: an nn.Module, of which a copy is trained, or a function that makes it, the same
            each time. data: a map-style dataset (`len`, `[]`) or a function that makes one; each
            item is a tensor, or a tuple or dict of tensors, and one privacy unit.
        loss: `(model, batch) -> (B,)`; a batch is like an item with B in dimension 0, and each loss
            a function of its own example alone.
        validation: items that count as public; their mean loss is told.
        method: a name of `METHODS`, or a whole Method, whose learning rate is its own.
        workers: Ray Train workers; 0 trains in this process. With workers, model, data, loss and
            validation are functions of a module that they can import.
        public: whether `data` holds nobody's secrets.
        overrides: further `key=value` settings, such as `performance.micro_batch_size=8`.
        options: further arguments of `grape_ray.ray_backend.train.train`: run, storage, ledger,
            key_path, ledger_budget, consent.

    Raises:
        GrapeRayError: one of its kinds for whatever is wrong, before anything is paid for.
    """
    away = workers != 0
    task = FunctionTask(
        named(model, away),
        named(data, away),
        named(loss, away),
        named(validation, away) if validation is not None else "",
        public,
    )
    chosen = Method(name=method, learning_rate=learning_rate) if isinstance(method, str) else method
    config = Config(
        task=task,
        privacy=Privacy(
            epsilon=epsilon,
            delta=delta,
            expected_batch_size=expected_batch_size,
            steps=steps,
            clip_norm=clip_norm,
        ),
        method=chosen,
        performance=Performance(num_workers=workers),
    ).override(overrides)
    result = train(config, **options)
    folder = Storage(result.checkpoint.rpartition("/checkpoints/")[0])
    return Fitted(trained_model(config, newest_checkpoint(folder)), result)
