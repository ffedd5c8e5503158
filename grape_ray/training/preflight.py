"""The preflight that every run makes: the engine's clipped sum of a few examples against one
ordinary backward pass for each, before anything is paid for.

The engine itself verifies by value which row belongs to which example
(engines.verification.ownership). Here its sums are compared with the definition, under a clip norm
that clips every example, and each example's loss in the batch with its loss alone, without the
padding that the others need.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from grape_ray.config.methods import METHODS
from grape_ray.config.schema import MAX_CLIP_NORM, MIN_CLIP_NORM, Method, Privacy
from grape_ray.engines import Engine, from_config
from grape_ray.engines.capture.batches import Batch, count_examples, mapped
from grape_ray.engines.capture.model_state import awake
from grape_ray.engines.capture.random_state import random_states, set_states
from grape_ray.engines.engine import PerExampleLoss
from grape_ray.engines.subspace import owned_parameters
from grape_ray.errors import UnsupportedLayer
from grape_ray.privacy.types import ClippedSum
from grape_ray.tasks.task import evaluating
from grape_ray.training.definition import averaged, clip_factors, gradients_of_rows

# Largest difference that rounding explains, over the largest entry: fp32 sums of another order, and
# 8-bit mantissas.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION = 0.1


@dataclass(frozen=True)
class Report:
    """What a preflight found right.

    Attributes:
        method: the method. examples: compared with a backward pass of their own. tensors: trainable
            tensors, all of them noised.
        projected: those trained in a subspace. parameters: trainable numbers; coordinates: numbers
            noised a step.
        worst: largest difference over the largest entry, and the tensor it was found in.
    """

    method: str
    examples: int
    tensors: int
    projected: int
    parameters: int
    coordinates: int
    worst: float
    worst_tensor: str


def preflight(
    model: nn.Module,
    per_example_loss: PerExampleLoss,
    batch: Batch,
    privacy: Privacy,
    method: Method,
    key: bytes = b"",
    examples: int = 3,
    alone: Sequence[Batch] = (),
    views: int = 1,
) -> Report:
    """Compares an engine with ordinary autograd on the first examples of a batch, in the mode that
    the model is in; where units have several rows (`privacy.unit`, or `views` a record), with two
    of the rows averaged, too.

    Args:
        key: public key of the projections. examples: how many of the batch are compared, at most.
        alone: those examples again, each as a batch of its own, as it comes without the padding
            that the others need; this shows a model that looks at padding, so that one example's
            length reaches into another's gradient. By default rows of `batch` are taken.

    Guarantees: the model's weights and all random states are as before when it returns.

    Raises:
        UnsupportedLayer: a tensor's clipped sum differs from the reference, is missing, or one
            example exceeds the clip norm; the tensor is named. An example's loss is another beside
            others than alone. ConfigError: the method cannot train this model (a rank above a
            layer's side, a loss of a wrong shape).
    """
    count = min(count_examples(batch), examples)
    few = _picked(batch, slice(0, count))
    device = next(model.parameters()).device
    state = random_states(device)
    try:
        with awake(model):
            engine = from_config(model, privacy, method, key)
            wanted = gradients_of_rows(engine, per_example_loss, few, count)
            twin = method if METHODS[method.name].exact else _exact_twin(method)

            def made(clip_norm: float) -> Engine:
                return from_config(model, replace(privacy, clip_norm=clip_norm), twin, key)

            exact = made(_clipping_norm(engine, wanted))
            # the engine draws the dropout masks that the references had
            set_states(state)
            summed = exact.clipped_sum(per_example_loss, few)
            worst, tensor = _compare(exact, wanted, summed)
            if count > 1 and (privacy.unit or views > 1):
                set_states(state)
                found = _compare_units(made, exact, per_example_loss, few, wanted)
                worst, tensor = max((worst, tensor), found)
            if twin is not method:  # its estimates cannot be compared, but it must not fail
                engine.layouts = exact.layouts
                summed = engine.clipped_sum(per_example_loss, few)
            _check_complete(engine, summed)
            singles = alone or [_picked(few, slice(index, index + 1)) for index in range(count)]
            _check_same_losses(exact, per_example_loss, few, singles)
            if engine.private and METHODS[method.name].exact:
                for single in singles[:2]:  # of several, contributions could cancel
                    _check_norm(exact.clipped_sum(per_example_loss, single), exact.clip_norm)
    finally:
        set_states(state)
    return Report(
        method.name,
        count,
        len(engine.params),
        len(engine.subspace.plan),
        sum(p.numel() for p in engine.params.values()),
        engine.coordinates,
        worst,
        tensor,
    )


def _clipping_norm(engine: Engine, references: Sequence[Mapping[str, Tensor]]) -> float:
    """A clip norm that clips every example with a gradient, so that a gradient in another's place
    shows in the sum.
    """
    norms = [
        math.sqrt(sum(float(g.square().sum()) for g in grads.values())) for grads in references
    ]
    # Below it Privacy takes no clip norm, and rounding would be all that is compared.
    least = 2 * MIN_CLIP_NORM
    usable = [norm for norm in norms if math.isfinite(norm) and norm > least]
    return min(engine.clip_norm, min(usable) / 2) if usable else engine.clip_norm


def _exact_twin(method: Method) -> Method:
    """The same capture with exact norms, for a method that estimates them: estimates cannot be
    compared with a definition.
    """
    return Method(name="ghost", routes=tuple(r for r in method.routes if not r.endswith(":sketch")))


def _picked(batch: Batch, examples: slice) -> Batch:
    """Some examples of a batch, padded as they are there."""
    return mapped(batch, lambda t: t[examples])


def _check_complete(engine: Engine, summed: ClippedSum) -> None:
    """Refuses a sum that lacks a trainable tensor: the optimizer would move it without noise, or
    not at all.
    """
    trained = owned_parameters(engine.model)
    lost = {name for name in trained if engine.subspace.part(name) not in summed.tensors}
    if lost:
        raise UnsupportedLayer(
            f"parameter '{min(lost)}'",
            "no gradient and no noise",
            "every trainable tensor noised",
            "freeze it",
        )


def _check_norm(summed: ClippedSum, clip_norm: float) -> None:
    """Refuses the clipped sum of one example where its norm over all tensors exceeds the bound."""
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in summed.tensors.values()))
    if not norm <= clip_norm * (1 + 1e-4):
        raise UnsupportedLayer(
            "the clipped gradient of one example",
            f"norm {norm:g}",
            f"at most clip_norm = {clip_norm:g}",
            "freeze what is not clipped, or use another method",
        )


@torch.no_grad()
def _check_same_losses(
    engine: Engine, loss: PerExampleLoss, together: Batch, singles: Sequence[Batch]
) -> None:
    """Refuses a loss whose value in a batch differs from its value alone; in eval mode where the
    training mode draws at random.
    """
    mode = evaluating(engine.model) if _draws(engine, loss, together) else contextlib.nullcontext()
    with mode:
        mine = torch.cat([loss(engine.model, mapped(single)).double() for single in singles])
        joined = loss(engine.model, mapped(together)).double()
    # a forward pass rounds less than the gradients, which `_tolerance` is for
    limit = _tolerance(engine) / 10
    if not torch.allclose(joined, mine, limit, limit, equal_nan=True):
        raise UnsupportedLayer(
            "the loss of an example",
            "another value in a batch than alone",
            "a function of that example alone",
            "let the model look neither at other examples nor at the padding that they bring",
        )


def _draws(engine: Engine, loss: PerExampleLoss, batch: Batch) -> bool:
    """Whether two passes of one batch differ by the random numbers that they draw."""
    first, second = (loss(engine.model, mapped(batch)) for _ in range(2))
    return not torch.equal(torch.nan_to_num(first), torch.nan_to_num(second))


def _tolerance(engine: Engine) -> float:
    """What rounding explains, relative to the largest entry, in the least precise parameter: also
    of those that are frozen, whose products round what reaches the trained ones.
    """
    return max(_TOLERANCE.get(p.dtype, _LOW_PRECISION) for p in engine.model.parameters())


def _compare(
    engine: Engine, references: Sequence[Mapping[str, Tensor]], summed: ClippedSum
) -> tuple[float, str]:
    """The largest relative difference from the reference, and where. Raises UnsupportedLayer above
    what rounding explains.
    """
    wanted: dict[str, Tensor] = {}
    for grads in references:
        factor = clip_factors(grads, engine)
        # an example whose gradient is not finite contributes zero to a private sum
        alive = not engine.private or all(bool(torch.isfinite(g).all()) for g in grads.values())
        for name, grad in grads.items():
            wanted[name] = wanted.get(name, 0) + (
                factor[name] * grad if alive else torch.zeros_like(grad)
            )
    finite = {n: torch.nan_to_num(t.double(), nan=float("inf")) for n, t in summed.tensors.items()}
    scale = max(float(t.abs().max()) for t in wanted.values()) or 1.0
    errors = {name: float((finite[name] - wanted[name]).abs().max()) / scale for name in wanted}
    name = max(errors, key=lambda n: errors[n])
    limit = _tolerance(engine)
    if not errors[name] <= limit:
        raise UnsupportedLayer(
            f"per-example gradient of parameter '{name}'",
            f"{errors[name]:.1e} away from a backward pass an example",
            f"at most {limit:g}, relative",
            "freeze it (requires_grad=False), or teach its operation with grape_ray.register_rule",
        )
    return errors[name], name


def _compare_units(
    made: Callable[[float], Engine],
    known: Engine,
    loss: PerExampleLoss,
    batch: Batch,
    references: Sequence[Mapping[str, Tensor]],
) -> tuple[float, str]:
    """As `_compare`, with the first two rows as one unit's.

    Args:
        made: the engine by its clip norm. known: one that has verified this batch.
    """
    units = averaged(references)
    engine = made(_loose_norm(units[0], known.clip_norm))
    engine.layouts = known.layouts
    groups = torch.tensor([0, *range(len(units))])
    return _compare(engine, units, engine.clipped_sum(loss, batch, groups=groups, units=len(units)))


def _loose_norm(average: Mapping[str, Tensor], otherwise: float) -> float:
    """A clip norm that leaves an average as it is and would clip a sum of two: under one that clips
    both they are the same.
    """
    norm = 1.5 * math.sqrt(sum(float(g.square().sum()) for g in average.values()))
    return norm if MIN_CLIP_NORM <= norm <= MAX_CLIP_NORM else otherwise
