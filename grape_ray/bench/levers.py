"""What each choice of private training buys: a small network on frozen embeddings of PUBLIC texts,
with one choice changed at a time.

The network (two linear layers, a GELU between) is written out by hand, so that a choice is a line
and a run takes two seconds; many seeds make small differences visible. Its noise is PyTorch's, from
a seed, and no ledger knows of it: a simulation of the mechanism, which protects nobody.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grape_ray.accounting.calibration import noise_multiplier
from grape_ray.data.arrays import Records
from grape_ray.privacy.clipping import factors
from grape_ray.tasks.batches import batches
from grape_ray.tasks.task import load, resolved
from grape_ray.tasks.text_classification import TextClassification

_sigma = lru_cache(noise_multiplier)
_LENGTH = 20.0  # of an embedding: about the root of its width
_HIDDEN = 256
_BETA2 = 0.99
_TRIED = 3  # seeds with which the rate of a lever is chosen


@dataclass(frozen=True)
class Lever:
    """One way of training.

    Attributes:
        rank: of the first layer's projection; 0 clips the gradient itself. basis: columns of the
            projection: `random`, normal and new every step; `public`, the principal directions of
            public embeddings; `released`, half of them the main directions of earlier noised
            gradients, the rest random beside those. beta1: of the mean of gradients or, of a
            projected layer, of lifted updates (`method.moments=lifted`).
        clipping: `automatic` or `flat`. second: the divisor of an update: `kept`, the root of the
            mean square; `corrected`, less the noise's variance (Tang et al. 2024, arXiv
            2312.14334), but at least `floor` of it; `noise`, the noise's deviation alone.
        moving, tail: the weights are a moving average with this decay, or the mean over this last
            share of the steps. whitened: embeddings are whitened by the covariance of public ones.
    """

    name: str
    rank: int = 16
    basis: Literal["random", "public", "released"] = "random"
    beta1: float = 0.0
    clipping: Literal["automatic", "flat"] = "automatic"
    clip_norm: float = 1.0
    second: Literal["kept", "corrected", "noise"] = "kept"
    floor: float = 0.3
    moving: float = 0.0
    tail: float = 0.0
    whitened: bool = False
    rates: tuple[float, ...] = (5e-3, 1e-2, 2e-2)


BASE = Lever("rank 16, new random projections, automatic clipping")
LEVERS = (
    replace(BASE, name="rank 4", rank=4),
    replace(BASE, name="rank 64", rank=64),
    replace(BASE, name="momentum 0.9 of lifted updates", beta1=0.9),
    replace(BASE, name="the same, rank 64", rank=64, beta1=0.9),
    replace(BASE, name="exact clipping in full", rank=0, beta1=0.9, rates=(1e-3, 3e-3, 1e-2)),
    *(replace(BASE, name=f"flat, C = {c:g}", clipping="flat", clip_norm=c) for c in (0.1, 1, 5)),
    *(
        replace(
            BASE, name=f"second moment less the noise, floor {floor:g}", second="corrected",
            floor=floor, rates=(1e-3, 3e-3, 1e-2),
        )
        for floor in (0.03, 0.3)
    ),
    replace(BASE, name="no second moment", second="noise"),
    replace(BASE, name="moving average, 0.95", moving=0.95),
    replace(BASE, name="mean of the last quarter", tail=0.25),
    replace(BASE, name="projections from released gradients", basis="released"),
    replace(BASE, name="projections from public data", basis="public"),
    replace(BASE, name="projections from public data, rank 64", basis="public", rank=64),
    replace(BASE, name="embeddings whitened by public data", whitened=True),
)  # fmt: skip


@dataclass(frozen=True)
class Embedded:
    """Embeddings (N, width) and classes (N,) of the private texts, of public ones of the same kind,
    and of those that accuracy is measured on.
    """

    train: Tensor
    train_labels: Tensor
    public: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1


@dataclass(frozen=True)
class Setting:
    """The budget and the steps that all levers have in common."""

    epsilon: float = 3.0
    delta: float = 1e-5
    batch: int = 256
    steps: int = 120


@dataclass(frozen=True)
class Effect:
    """A lever's accuracy over seeds, and its difference to the base's with the same seeds.

    Attributes:
        rate: the best of the lever's own. deviation: of one run. error: of `difference`, one
            standard error.
    """

    name: str
    rate: float
    accuracy: float
    deviation: float
    difference: float
    error: float


def embedded(task: TextClassification) -> Embedded:
    """The mean over the tokens of a frozen encoder's last layer, for all texts of a task; of the
    validation texts every second one is public.
    """
    task = replace(task, pooling="first", trainable=())
    data = load(task)
    task = resolved(task, data)
    model: Any = task.build_model(0)
    train, train_labels = _means(task, model, data.train)
    test, test_labels = _means(task, model, data.validation)
    return Embedded(train, train_labels, test[::2], test[1::2], test_labels[1::2])


def effects(data: Embedded, setting: Setting, seeds: int) -> Iterator[Effect]:
    """The base first, then each lever; at least `_TRIED` seeds."""
    base: list[float] = []
    for lever in (BASE, *LEVERS):
        tried = {r: _runs(data, setting, lever, r, range(_TRIED)) for r in lever.rates}
        rate = max(tried, key=lambda r: sum(tried[r]))
        found = tried[rate] + _runs(data, setting, lever, rate, range(_TRIED, seeds))
        base = base or found
        differences = [mine - other for mine, other in zip(found, base)]
        yield Effect(
            lever.name,
            rate,
            statistics.fmean(found),
            statistics.stdev(found),
            statistics.fmean(differences),
            statistics.stdev(differences) / math.sqrt(seeds),
        )


def _runs(
    data: Embedded, setting: Setting, lever: Lever, rate: float, seeds: Iterable[int]
) -> list[float]:
    return [accuracy(data, setting, lever, rate, seed) for seed in seeds]


def accuracy(data: Embedded, setting: Setting, lever: Lever, rate: float, seed: int) -> float:
    """On the test texts, after one run."""
    gauss = torch.Generator().manual_seed(seed)
    chance = np.random.default_rng(seed)
    prepared = _whitener(data.public) if lever.whitened else _lengthened
    train, public, test = (prepared(x) for x in (data.train, data.public, data.test))
    params = _begin(train.shape[1], data.classes, gauss)
    kept = [p.clone() for p in params]
    prob = setting.batch / len(train)
    sigma = _sigma(setting.epsilon, setting.delta, prob, setting.steps)
    noise = sigma * lever.clip_norm / setting.batch
    first, second = [torch.zeros(())] * 4, [torch.zeros(())] * 4
    axes = torch.linalg.eigh(public.T @ public).eigenvectors
    released = torch.zeros_like(params[0])
    averaged = 0
    for step in range(setting.steps):
        rows = torch.from_numpy(np.flatnonzero(chance.random(len(train)) < prob))
        basis = _basis(lever, step, axes, released, gauss)
        sums = _clipped_sums(params, train[rows], data.train_labels[rows], basis, lever)
        pace = rate * (1 - step / setting.steps)
        for place, (param, total) in enumerate(zip(params, sums)):
            release = total / setting.batch
            release += torch.randn(release.shape, generator=gauss) * noise
            second[place] = torch.lerp(release.square(), second[place], _BETA2)
            update, lasting = release, basis is None or place > 0
            if lasting:
                first[place] = torch.lerp(release, first[place], lever.beta1)
                update = first[place] / (1 - lever.beta1 ** (step + 1))
            update = update / _divisor(lever, second[place] / (1 - _BETA2 ** (step + 1)), noise)
            if basis is not None and place == 0:
                released = torch.lerp(release @ basis.T, released, 0.95)
                first[place] = torch.lerp(update @ basis.T, first[place], lever.beta1)
                update = first[place] / (1 - lever.beta1 ** (step + 1))
            param -= pace * update
        averaged = _average(lever, kept, params, step, setting.steps, averaged)
    final = kept if averaged else params
    return float((_logits(final, test).argmax(1) == data.test_labels).float().mean())


def _clipped_sums(
    params: Sequence[Tensor], x: Tensor, labels: Tensor, basis: Tensor | None, lever: Lever
) -> list[Tensor]:
    """Sums over the examples of their clipped gradients: of the first weight, in coordinates of the
    basis where there is one, its bias, the second weight, its bias.
    """
    weight, bias, top, _ = params
    before = (x @ weight.T + bias).requires_grad_()
    hidden = F.gelu(before)
    error = torch.softmax(hidden.detach() @ top.T + params[3], 1)
    error -= F.one_hot(labels, error.shape[1])
    (below,) = torch.autograd.grad(hidden, before, error @ top)
    hidden = hidden.detach()
    seen = x if basis is None else x @ basis
    squares = (seen.square().sum(1) + 1) * below.square().sum(1)
    squares += (hidden.square().sum(1) + 1) * error.square().sum(1)
    share = factors({"": squares.double()}, lever.clipping, lever.clip_norm, None)[""][:, None]
    below, error = below * share.float(), error * share.float()
    return [below.T @ seen, below.sum(0), error.T @ hidden, error.sum(0)]


def _basis(
    lever: Lever, step: int, axes: Tensor, released: Tensor, gauss: torch.Generator
) -> Tensor | None:
    """The projection R (width, rank) of a step; the principal directions of public embeddings are
    the last columns of `axes` (width, width).
    """
    width = len(axes)
    if lever.rank == 0:
        return None
    if lever.basis == "public":
        return axes[:, -lever.rank :]
    if lever.basis == "random" or step < 10:
        return torch.randn(width, lever.rank, generator=gauss) / math.sqrt(lever.rank)
    known = torch.linalg.svd(released, full_matrices=False).Vh[: lever.rank // 2].T
    rest = lever.rank - known.shape[1]
    others = torch.randn(width, rest, generator=gauss) / math.sqrt(rest)
    return torch.cat([known, others - known @ (known.T @ others)], 1)


def _divisor(lever: Lever, squares: Tensor, noise: float) -> Tensor:
    if lever.second == "noise":
        return torch.full_like(squares, noise)
    if lever.second == "corrected":
        squares = (squares - noise**2).clamp(min=lever.floor * noise**2)
    return squares.sqrt() + 1e-8


def _average(
    lever: Lever, kept: list[Tensor], params: list[Tensor], step: int, steps: int, averaged: int
) -> int:
    """Takes the weights into their average, in place; how many it holds now."""
    share = 0.0
    if lever.moving:
        share = 1 - min(lever.moving, (1 + step) / (10 + step))
    elif lever.tail and step >= steps * (1 - lever.tail):
        share = 1 / (averaged + 1)
    if share == 0.0:
        return averaged
    for mine, param in zip(kept, params):
        mine.lerp_(param, share)
    return averaged + 1


def _begin(width: int, classes: int, gauss: torch.Generator) -> list[Tensor]:
    """Weights and biases, drawn uniformly as PyTorch's linear layers are."""

    def uniform(*shape: int, fan: int) -> Tensor:
        return (torch.rand(shape, generator=gauss) * 2 - 1) / math.sqrt(fan)

    return [
        uniform(_HIDDEN, width, fan=width), uniform(_HIDDEN, fan=width),
        uniform(classes, _HIDDEN, fan=_HIDDEN), uniform(classes, fan=_HIDDEN),
    ]  # fmt: skip


def _logits(params: Sequence[Tensor], x: Tensor) -> Tensor:
    weight, bias, top, top_bias = params
    return F.gelu(x @ weight.T + bias) @ top.T + top_bias


def _lengthened(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1) * _LENGTH


def _whitener(public: Tensor) -> Callable[[Tensor], Tensor]:
    """Takes the public mean off, and divides by the root of the public covariance, to which a tenth
    of its mean eigenvalue is added.
    """
    mean = public.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(public.T))
    root = vectors @ torch.diag((values + 0.1 * values.mean()).rsqrt()) @ vectors.T
    return lambda x: _lengthened((x - mean) @ root)


def _means(task: TextClassification, model: Any, records: Records) -> tuple[Tensor, Tensor]:
    """Embeddings and classes of records, in their order."""
    order, found, labels = [], [], []
    for indices, batch in batches(task, model, records, 256):
        order.append(indices)
        labels.append(batch.pop("labels"))
        states = model.base_model(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        found.append((states * mask).sum(1) / mask.sum(1))
    back = torch.from_numpy(np.argsort(np.concatenate(order)))
    return torch.cat(found)[back], torch.cat(labels)[back]
