"""The one table of what is measured: every method, the loops to compare with, and the peers where
they are installed.

A private step is a whole one: clipped sum, secure noise, update. Projections and singular vectors
are renewed every 100 steps, which the few timed steps do not reach: their cost falls on step 0,
which is in the peak bytes and not in the seconds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grape_ray.bench.models import Loss
from grape_ray.bench.paid import paid_steps
from grape_ray.config.methods import METHODS
from grape_ray.config.schema import Method, Privacy
from grape_ray.engines import Engine, from_config
from grape_ray.errors import ConfigError, nearest
from grape_ray.ledger.grant import Grant
from grape_ray.optim import Optimizer, make_optimizer
from grape_ray.privacy.noise import NoiseStream, privatize

LEARNING_RATE = 1e-4
CLIP_NORM = 1.0
_KEY = b"benchmark".ljust(32, b".")  # what is measured here protects nobody


@dataclass
class PrivateStep:
    """One step of a private method; its parts are fields, so that a profile can time each."""

    model: nn.Module
    loss: Loss
    batch: dict[str, Tensor]
    engine: Engine
    optimizer: Optimizer
    privatize: Callable[..., Any]
    stream: NoiseStream
    grant: Grant
    count: int = 0

    def __call__(self) -> None:
        summed = self.engine.clipped_sum(self.loss, self.batch, step=self.count)
        rows = len(self.batch["labels"])
        self.optimizer.step(
            self.privatize(summed, self.stream, grant=self.grant, expected_batch_size=rows)
        )
        self.count += 1


@dataclass
class PlainStep:
    """What a user without privacy runs: autograd and an optimizer of torch."""

    model: nn.Module
    loss: Loss
    batch: dict[str, Tensor]
    optimizer: torch.optim.Optimizer

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.model, self.batch).mean().backward()
        self.optimizer.step()


@dataclass
class FloorStep:
    """Forward and input gradients alone: every parameter frozen, the embeddings' output asks for
    its gradient, no optimizer.
    """

    model: nn.Module
    loss: Loss
    batch: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        inputs: Any = self.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        inputs.register_forward_hook(lambda module, given, output: output.requires_grad_())

    def __call__(self) -> None:
        self.loss(self.model, self.batch).mean().backward()


Step = Callable[[], None]


@dataclass(frozen=True)
class Candidate:
    """One row of a table.

    Attributes:
        method: its name in results. make: (model, loss, batch, rank) -> a function that takes one
            step.
        ranks: the ranks that are measured unless asked for otherwise; empty where there is none.
        package: what must be installed. about: one line. usual: whether it is measured where no
            method is named.
    """

    method: str
    make: Callable[[nn.Module, Loss, dict[str, Tensor], int | None], Step]
    about: str
    ranks: tuple[int, ...] = ()
    package: str = ""
    usual: bool = True

    @property
    def missing(self) -> str:
        """Why it cannot be measured here; empty if it can."""
        if not self.package or importlib.util.find_spec(self.package):
            return ""
        return f"{self.package} is not installed; pip install 'grape-ray[peers]'"


def _private(name: str, routes: tuple[str, ...] = ()) -> Callable[..., Step]:
    def make(model: nn.Module, loss: Loss, batch: dict[str, Tensor], rank: int | None) -> Step:
        method = Method(
            name=name, learning_rate=LEARNING_RATE, rank=rank or Method.rank, routes=routes
        )
        engine = from_config(model, Privacy(clip_norm=CLIP_NORM), method, key=_KEY)
        engine.use_secret(_KEY)
        return PrivateStep(
            model,
            loss,
            batch,
            engine,
            make_optimizer(model, engine, method, 10**6),
            privatize,
            NoiseStream(_KEY),
            paid_steps(engine.estimated),
        )

    return make


def _adamw(**options: Any) -> Callable[..., Step]:
    def make(model: nn.Module, loss: Loss, batch: dict[str, Tensor], rank: int | None) -> Step:
        return PlainStep(
            model, loss, batch, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, **options)
        )

    return make


def _floor(model: nn.Module, loss: Loss, batch: dict[str, Tensor], rank: int | None) -> Step:
    return FloorStep(model, loss, batch)


def _opacus(name: str) -> Callable[..., Step]:
    def make(model: nn.Module, loss: Loss, batch: dict[str, Tensor], rank: int | None) -> Step:
        from grape_ray.bench import peers

        return getattr(peers, name)(model, loss, batch)

    return make


_RANKS = {"grape": (16, 64), "dp_galore": (16,)}
CANDIDATES: dict[str, Candidate] = {
    c.method: c
    for c in (
        Candidate("none", _adamw(), "torch.optim.AdamW as it comes, all parameters"),
        Candidate(
            "none_fused", _adamw(fused=True), "torch.optim.AdamW(fused=True), all parameters"
        ),
        Candidate("floor", _floor, "forward and input gradients alone, no optimizer"),
        *(
            Candidate(n, _private(n), info.title, _RANKS.get(n, ()))
            for n, info in METHODS.items()
            if info.private
        ),
        Candidate(
            "ghost_gram",
            _private("ghost", ("*:gram",)),
            "ghost clipping, Gram norms alone",
            usual=False,
        ),
        Candidate(
            "bookkeeping_gram",
            _private("bookkeeping", ("*:gram",)),
            "Book-Keeping, Gram norms alone",
            usual=False,
        ),
        Candidate(
            "opacus_hooks",
            _opacus("hooks"),
            "Opacus, per-example gradients by hooks",
            package="opacus",
        ),
        Candidate("opacus_ghost", _opacus("ghost"), "Opacus, ghost clipping", package="opacus"),
    )
}


def chosen(names: Iterable[str]) -> list[tuple[str, int | None]]:
    """(method, rank) of each name, `method` or `method:rank`; every candidate for no name. `none`
    is always first: it is the baseline.

    Raises:
        ConfigError: an unknown method, or a rank where the method has none.
    """
    found: list[tuple[str, int | None]] = [("none", None)]
    for text in list(names) or [c.method for c in CANDIDATES.values() if c.usual]:
        name, _, rank = text.strip().partition(":")
        if name not in CANDIDATES:
            raise ConfigError(
                "method of the benchmark",
                name,
                "one of " + ", ".join(CANDIDATES),
                nearest(name, CANDIDATES),
            )
        ranks = CANDIDATES[name].ranks
        if rank and not (ranks and rank.isdecimal() and int(rank) > 0):
            raise ConfigError(
                f"rank of {name}", rank, "a rank >= 1" if ranks else "no rank: the method has none"
            )
        found += [(name, int(rank))] if rank else [(name, r) for r in ranks or (None,)]
    return list(dict.fromkeys(found))


def label(method: str, rank: int | None) -> str:
    """`method` or `method:rank`."""
    return method if rank is None else f"{method}:{rank}"
