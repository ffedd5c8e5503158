"""The ownership check: which rows belong to which example, by value, at every use of a parameter.

The losses of a group of examples go backward alone. Every tap must then receive exact zeros in the
rows of all others, and in the group's own rows what it receives when all losses go backward
together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grape_ray.engines.capture import row_layout
from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.row_layout import Layout
from grape_ray.engines.capture.tap import Phase, RetryPass, Tap
from grape_ray.errors import UnsupportedLayer

# examples that are told apart by exact zeros, in 2 log2 B backward passes; more by weights, in one
# beside two of halves
_FEW = 8
_MOST = 1000  # examples that weights tell apart where rounding is below a thousandth
_CANCELLED = 2.0**-20  # of an example's largest row: eight times the precision of fp32
# for every tap (2, *lead): sums of its gradient and of its magnitudes over the features
GradientSums = list[Tensor]


def ownership(
    capture: CapturePass, losses: Tensor, tolerance: float, thorough: bool
) -> GradientSums:
    """Finds the layout of every tap that has none, and checks those that have one, by exact zeros.

    Args:
        tolerance: of gradients that differ by rounding, relative. thorough: tell every two examples
            apart; otherwise a random half from the rest.

    Returns:
        What all losses together bring.

    Raises:
        UnsupportedLayer: gradients of one example arrive in rows that belong to another, or in no
            regular place, or are others when other losses go backward with them.
        RetryPass: that can be because shared values meet the batch at another place than their
            sizes suggest.
    """
    if not losses.requires_grad:
        return []
    whole = gradient_sums(capture, capture.taps, losses, torch.ones(capture.examples))
    if capture.examples == 1:
        return whole
    # neighbouring weights must lie further apart than rounding reaches
    by_weight = thorough and _FEW < capture.examples <= _MOST and tolerance < 1 / _MOST
    groups = (
        row_layout.every_pair(capture.examples)
        if thorough and not by_weight
        else row_layout.random_halves(capture.examples)
    )
    kept = [gradient_sums(capture, capture.taps, losses, group) for group in groups]
    # from 1 up to 2, so that no example drowns in another's rounding
    weights = 1 + torch.arange(capture.examples) / capture.examples
    weighted = gradient_sums(capture, capture.taps, losses, weights) if by_weight else whole
    weights = weights if by_weight else torch.ones(capture.examples)
    wrong: list[Tap] = []
    for number, tap in enumerate(capture.taps):
        evidence = torch.stack([sums[number][1] > 0 for sums in kept]).cpu()
        reached = functools.partial(
            _weights_reached, tap, whole[number][1], weighted[number][1], weights
        )
        if tap.layout is None:
            fits = _find_layout(tap, evidence, groups, reached)
        else:
            fits = row_layout.agrees(tap.layout, evidence, groups) and reached(tap.layout)
        if not fits:
            wrong.append(tap)
    # what was tried both ways already is refused
    sites = {tap.site for tap in wrong if tap.site is not None} - capture.inner_sites
    if sites:
        raise RetryPass(sites)
    if wrong:
        raise _not_owned(wrong[0], capture.examples)
    for group, sums in zip(groups, kept):
        same_gradients(
            capture.taps,
            whole,
            sums,
            group,
            tolerance,
            "another gradient where the losses of others go backward with it",
        )
    return whole


def _find_layout(
    tap: Tap, evidence: Tensor, groups: Tensor, reached: Callable[[Layout], bool]
) -> bool:
    """Gives a tap the first layout that the evidence (K, *lead) allows; whether there is one, or
    none is needed.
    """
    arrived = bool(evidence.any())
    found = row_layout.consistent(evidence, groups) if arrived else []
    tap.consistent = [layout for layout in found if reached(layout)]
    tap.layout = tap.consistent[0] if tap.consistent else None
    owners = {(c.axis, *c.owners(tap.lead, groups.shape[1]).tolist()) for c in tap.consistent}
    tap.unambiguous = len(owners) <= 1
    return tap.layout is not None or not arrived


def _weights_reached(
    tap: Tap, whole: Tensor, weighted: Tensor, weights: Tensor, layout: Layout
) -> bool:
    """Whether each example's loss weight shows in its own rows under a layout: there magnitudes
    under weighted losses must be that weight times those under unweighted ones.

    Args:
        whole, weighted: (*lead,) magnitudes of gradients, unweighted and weighted. weights: (B,).
    """
    examples, dims = len(weights), len(tap.lead)
    mine, theirs = (layout.by_example(part, dims, examples) for part in (whole, weighted))
    # neighbouring weights are 1/B apart: a quarter of that tells one from the next; what cancels
    # in a row, as the gradient of a first token's query does, leaves rounding of its neighbours
    slack = mine / (4 * examples) + _CANCELLED * mine.amax(1, keepdim=True)
    return not bool(((theirs - weights.to(mine)[:, None] * mine).abs() > slack).any())


def gradient_sums(
    capture: CapturePass, taps: Sequence[Tap], losses: Tensor, group: Tensor
) -> GradientSums:
    """What the losses of one group bring to every tap; the graph is kept."""
    for tap in taps:
        tap.evidence.clear()
    phase, capture.phase = capture.phase, Phase.VERIFY
    try:
        # the taps keep evidence while they verify, and hand nothing to the collector
        torch.autograd.backward(losses, group.to(losses.device, losses.dtype), retain_graph=True)
    except RuntimeError as error:
        raise UnsupportedLayer(
            "the backward pass",
            str(error).splitlines()[0],
            "a forward pass that torch can go back through",
            "do not write in place",
        ) from error
    finally:
        capture.phase = phase
    capture.check_leaks()
    found = []
    for tap in taps:
        nothing = torch.zeros(2, *tap.lead, dtype=torch.float64, device=losses.device)
        found.append(torch.stack(tap.evidence).sum(0) if tap.evidence else nothing)
        tap.evidence.clear()
    return found


def same_gradients(
    taps: Sequence[Tap],
    one: GradientSums,
    other: GradientSums,
    group: Tensor,
    tolerance: float,
    got: str,
) -> None:
    """Raises UnsupportedLayer where the rows of a group's examples have received two different
    gradients.
    """
    for tap, a, b in zip(taps, one, other):
        if tap.layout is None:
            continue
        own = torch.ones((), dtype=torch.bool)
        # of several layouts that fit, only rows that all of them give to the group are its own
        for layout in tap.consistent or [tap.layout]:
            mine = group[layout.owners(tap.lead, len(group))]
            own = own & (
                mine
                if layout.only is not None
                else mine.view(*[-1 if d == layout.axis else 1 for d in range(len(tap.lead))])
            )
        own = own.to(a.device)
        # relative to the magnitudes: terms that cancel leave rounding of their own size
        excess = (a[0] - b[0]).abs() - tolerance * torch.maximum(a[1], b[1])
        if bool(((excess > 0) & own).any()):
            raise UnsupportedLayer(
                f"the gradient of an example at operation '{tap.key[1]}' on parameter {tap.key[0]}",
                got,
                "a gradient of that example's loss alone",
                "let no hook or backward function look at the whole batch, or scale or clip what"
                " comes back",
            )


def by_example(tap: Tap, sums: Tensor, layout: Layout, examples: int) -> Tensor:
    """Sums over features (2, *lead), as in `GradientSums`, summed over each example's rows too ->
    (2, B).
    """
    return torch.stack([layout.summed(part, len(tap.lead), examples) for part in sums])


def same_in_part(
    taps: Sequence[Tap],
    whole: GradientSums,
    some: Sequence[Tap],
    part: GradientSums,
    picked: Tensor,
    examples: int,
    tolerance: float,
) -> None:
    """Raises UnsupportedLayer where examples `picked` (indices) have another gradient in a batch of
    their own, use by use.
    """
    for tap, all_of_it, other, its in zip(taps, whole, some, part):
        layout = (
            tap.layout.fitted(other.lead, len(picked))
            if tap.layout is not None and tap.layout.only is None
            else None
        )
        if tap.layout is None or layout is None:
            continue
        a = by_example(tap, all_of_it, tap.layout, examples)[:, picked.to(all_of_it.device)]
        b = by_example(other, its, layout, len(picked))
        if bool(((a[0] - b[0]).abs() > tolerance * torch.maximum(a[1], b[1])).any()):
            raise UnsupportedLayer(
                f"the gradient of an example at operation '{tap.key[1]}' on parameter {tap.key[0]}",
                "another gradient in a smaller batch",
                "a gradient that does not depend on the number of examples",
                "divide by nothing that the batch's size enters",
            )


def _not_owned(tap: Tap, examples: int) -> UnsupportedLayer:
    return UnsupportedLayer(
        f"operation '{tap.key[1]}' on parameter {tap.key[0]}",
        f"rows {tap.lead} in which gradients of several of {examples} examples meet",
        "rows that each belong to one example, in a regular order (batch-first, view after view, or"
        " time-major)",
        "freeze the parameter (requires_grad=False), or keep examples in order and apart",
    )
