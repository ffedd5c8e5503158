"""The few types that cross module borders; the noise line runs between ClippedSum and
PrivateGradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, replace
from typing import TYPE_CHECKING, cast

from grape_ray.errors import GrapeRayError
from grape_ray.storage import Json

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClippedSum:
    """SENSITIVE: the sum over examples of clipped per-example gradients; never log, save or step
    with it.

    Guarantees: adding or removing one example (one unit, with all its rows) moves `tensors`, taken
    as one flat vector, by at most `sensitivity` in L2 norm.

    Attributes:
        tensors: parameter name -> sum, fp32 or fp64; shape of the parameter, or of its coordinates
            where a subspace projects it; one tensor where all have their coordinates in common
            (`Subspace.part`).
        sensitivity: L2 sensitivity under add/remove of one example; the noise's standard deviation
            is noise_multiplier * sensitivity.
        unprotected: diagnostics, e.g. `norms` of examples or units and `losses` (B,) of rows;
            outside every guarantee.
        step: the step it was summed for; None leaves it to `privatize`. period: of the projections
            that its coordinates belong to; None where nothing is projected.
        estimated: (number of probes, whether all examples share them) where norms are estimates,
            so that `sensitivity` holds in distribution only; None where they are upper bounds.
    """

    tensors: Mapping[str, Tensor]
    sensitivity: float
    unprotected: Json = field(default_factory=Json, repr=False)
    step: int | None = None
    period: int | None = None
    estimated: tuple[int, bool] | None = None

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """The sum over two disjoint sets of examples (micro-batches of one step); adds into this
        one's memory.
        """
        mine, theirs = (
            (sum.tensors.keys(), sum.sensitivity, sum.step, sum.estimated) for sum in (self, other)
        )
        if mine != theirs:
            raise GrapeRayError(
                "two clipped sums of different mechanisms cannot be added",
                f"sensitivities {self.sensitivity} and {other.sensitivity}, steps {self.step} and"
                f" {other.step}",
                "sums made by one engine in one step",
            )
        # in place: a second sum of the model's size would double what a step holds
        for name, mine in self.tensors.items():
            mine.add_(other.tensors[name])
        joined = {
            k: [*_listed(v), *_listed(other.unprotected[k])]
            for k, v in self.unprotected.items()
            # diagnostics that one of them lacks would not be one an example any more
            if k in other.unprotected
        }
        return replace(self, unprotected=joined)


def step_of(carrier: ClippedSum | PrivateGradient | NonPrivateGradient, step: int | None) -> int:
    """The step that a sum or a gradient carries, or `step` where it carries none.

    Raises:
        GrapeRayError: `step` is another one, or there is none.
    """
    known = step if carrier.step is None else carrier.step
    if known is None or step not in (None, known):
        expected = "a step" if known is None else f"step {known}, for which it was made"
        raise GrapeRayError(
            f"the step of a {type(carrier).__name__}",
            step,
            expected,
            "pass step= to engine.clipped_sum",
        )
    return known


def _listed(value: object) -> list[object]:
    return cast(list[object], value) if isinstance(value, list) else [value]


_PRIVATIZE = object()  # what `privatize` alone passes on


@dataclass(frozen=True)
class PrivateGradient:
    """Released: the noised mean gradient of one step; everything computed from it is
    post-processing.

    Made by `grape_ray.privacy.noise.privatize` alone.

    Attributes:
        tensors: as in ClippedSum, divided by the expected batch size, noise included.
        step: the step whose noise it carries. period: as in ClippedSum.
        noise_std: standard deviation of the noise in each coordinate of `tensors`, after the
            division.
    """

    tensors: Mapping[str, Tensor]
    step: int
    noise_std: float
    period: int | None = None
    made_by: InitVar[object] = None

    def __post_init__(self, made_by: object) -> None:
        if made_by is not _PRIVATIZE:
            raise GrapeRayError(
                "a PrivateGradient is made by noise.privatize alone",
                "a direct construction",
                "a ClippedSum that went through noise.privatize",
                "call grape_ray.privacy.noise.privatize",
            )


@dataclass(frozen=True)
class NonPrivateGradient:
    """The plain mean gradient of the non-private baseline (method `none`); carries no guarantee at
    all.
    """

    tensors: Mapping[str, Tensor]
    step: int
    noise_std: float = 0.0
    period: int | None = None
