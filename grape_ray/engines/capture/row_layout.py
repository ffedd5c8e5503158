"""Which example owns which rows of a tensor: regular layouts, and how they are inferred from where
gradients are exactly zero.

Shapes: B examples, K groups of examples, *lead the leading dimensions of a tensor, those that are
not features.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Lead = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """One leading dimension carries the examples: it is `outer` x B x `inner` long, and its entry j
    belongs to example j // inner % B.

    (B, T) has outer = inner = 1 on axis 0, (B * T,) has inner = T, two views one after the other (2
    * B,) have outer = 2, time-major (T, B) lies on axis 1.

    Attributes:
        only: the example that owns all of it, as in a loop over the examples; the other fields say
            nothing then.
    """

    axis: int = 0
    outer: int = 1
    inner: int = 1
    only: int | None = None

    def fitted(self, lead: Lead, examples: int) -> Layout | None:
        """The same layout for another size, or None where it does not follow from this one.

        A factor that was seen to be more than 1 may be another number; of two views one after the
        other it would not be known whether there are more of them now, or more entries in each.
        """
        if self.only is not None:
            return self
        if self.axis >= len(lead) or lead[self.axis] % examples:
            return None
        times = lead[self.axis] // examples
        if times == self.outer * self.inner:
            return self
        return Layout(self.axis, 1, times) if self.outer == 1 and self.inner > 1 else None

    def owners(self, lead: Lead, examples: int) -> Tensor:
        """The owner of each entry of the axis, int64."""
        if self.only is not None:
            return torch.tensor([self.only])
        return torch.arange(lead[self.axis]) // self.inner % examples

    def by_example(self, tensor: Tensor, dims: int, examples: int) -> Tensor:
        """(*lead, *features) with `dims` leading dimensions -> (B, T, *features), T all positions
        of an example.
        """
        features = tensor.shape[dims:]
        if self.only is not None:
            out = tensor.new_zeros(examples, math.prod(tensor.shape[:dims]), *features)
            out[self.only] = tensor.reshape(out.shape[1:])
            return out
        if self.axis == 0 and self.outer == 1:
            return tensor.reshape(examples, -1, *features)
        split = tensor.unflatten(self.axis, (self.outer, examples, self.inner))
        return split.movedim(self.axis + 1, 0).reshape(examples, -1, *features)

    def summed(self, tensor: Tensor, dims: int, examples: int) -> Tensor:
        """(*lead, *features) -> (B, *features), summed over the positions of each example."""
        if self.only is not None:
            return self.by_example(tensor, dims, examples).sum(1)
        split = tensor.unflatten(self.axis, (self.outer, examples, self.inner))
        # a sum over a dimension of 1 would be a copy
        rest = [d for d in range(dims + 2) if d != self.axis + 1 and split.shape[d] != 1]
        kept = split.sum(rest, keepdim=True) if rest else split
        return kept.reshape(examples, *tensor.shape[dims:])

    def own_rows(self, tensor: Tensor, examples: int) -> Tensor:
        """(*lead) -> (B, *lead): of each example its own rows, and zeros in those of others."""
        owner = self.owners(tuple(tensor.shape), examples).to(tensor.device)
        mine = owner == torch.arange(examples, device=tensor.device).unsqueeze(1)
        sizes = [1] * tensor.ndim
        if self.only is None:
            sizes[self.axis] = -1
        return tensor * mine.view(examples, *sizes)


def candidates(lead: Lead, examples: int) -> Iterator[Layout]:
    """All regular layouts that a tensor's sizes allow, the usual ones first."""
    for axis, size in enumerate(lead):
        if size and size % examples == 0:
            times = size // examples
            outers = dict.fromkeys([1, times, *(n for n in range(2, times) if times % n == 0)])
            yield from (Layout(axis, outer, times // outer) for outer in outers)
    yield from (Layout(only=index) for index in range(examples))


def agrees(layout: Layout, evidence: Tensor, groups: Tensor) -> bool:
    """Whether every group's gradients stay within the rows of its own examples.

    Args:
        evidence: (K, *lead) bool, where the gradient of the group's losses is not zero. groups: (K,
            B) bool.
    """
    owners = layout.owners(tuple(evidence.shape[1:]), groups.shape[1])
    own = groups[:, owners]
    if layout.only is not None:
        return not bool((evidence.reshape(len(evidence), -1).any(1) & ~own[:, 0]).any())
    others = [d + 1 for d in range(evidence.ndim - 1) if d != layout.axis]
    reached = evidence.any(others) if others else evidence
    return not bool((reached & ~own).any())


def consistent(evidence: Tensor, groups: Tensor) -> list[Layout]:
    """The layouts that the evidence allows, the usual ones first; those of single examples only
    where no other does.
    """
    found = [
        c
        for c in candidates(tuple(evidence.shape[1:]), groups.shape[1])
        if agrees(c, evidence, groups)
    ]
    # all zeros but in one example's rows fits a regular layout as well, which says more
    return [c for c in found if c.only is None] or found


def every_pair(examples: int) -> Tensor:
    """Groups (K, B) such that of any two examples one is in a group without the other: the bits of
    their numbers, set and not set.
    """
    bits = (
        torch.arange(examples).unsqueeze(0)
        >> torch.arange(max((examples - 1).bit_length(), 1)).unsqueeze(1)
        & 1
    )
    return torch.cat([bits, 1 - bits]).bool()


def random_halves(examples: int) -> Tensor:
    """A random half of the examples and the rest, (2, B); of two examples it tells apart every
    other pair.
    """
    # not by torch's generator, whose numbers are the run's
    order = sorted(range(examples), key=lambda _: secrets.randbits(32))
    half = torch.zeros(examples, dtype=torch.bool)
    half[order[: (examples + 1) // 2]] = True
    return torch.stack([half, ~half])
