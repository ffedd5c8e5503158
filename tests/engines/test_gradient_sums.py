"""Gradients compared use by use: which rows weights have reached, and which examples have received
two different gradients.
"""

import pytest
import torch

from grape_ray.engines.capture.row_layout import Layout
from grape_ray.engines.capture.tap import Tap
from grape_ray.engines.verification.ownership import _weights_reached, same_gradients, same_in_part
from grape_ray.errors import UnsupportedLayer

TOLERANCE = 1e-3


def tap(lead, layout, name="w"):
    made = Tap((name, "linear", len(lead)), lead)
    made.layout = layout
    return made


@pytest.mark.parametrize("rows", [9, 64, 1000])
@pytest.mark.parametrize("kind", ["batch-first", "time-major", "views", "one example"])
def test_weights_tell_every_two_neighbours_apart_and_forgive_rounding(rows, kind):
    layout = {
        "batch-first": Layout(0, 1, 3),
        "time-major": Layout(1),
        "views": Layout(0, 2, 1),
        "one example": Layout(only=rows - 2),
    }[kind]
    use = tap(
        {
            "batch-first": (3 * rows,),
            "time-major": (4, rows),
            "views": (2 * rows, 2),
            "one example": (5,),
        }[kind],
        layout,
    )
    weights = 1 + torch.arange(rows) / rows
    shape = [-1 if d == layout.axis else 1 for d in range(len(use.lead))]
    reached = (
        weights[layout.owners(use.lead, rows)]
        .view(shape if layout.only is None else [1])
        .expand(use.lead)
        .double()
    )
    whole = torch.rand(use.lead, dtype=torch.float64) + 0.1
    assert _weights_reached(use, whole, reached * whole, weights, layout)
    rounded = reached * (1 + 1e-4 * (2 * torch.rand(use.lead) - 1)) * whole
    assert _weights_reached(use, whole, rounded, weights, layout)
    if layout.only is None and whole.numel() > rows:  # rounding alone arrives in one row of several
        small = whole.clone()
        small.view(-1)[0] *= 1e-8
        noisy = reached * small
        noisy.view(-1)[0] *= 3
        assert _weights_reached(use, small, noisy, weights, layout)
    for place in (0, whole.numel() - 1):
        for step in (1 / rows, -1 / rows):  # a row of the next example, or of the one before
            wrong = (reached * whole).clone()
            wrong.view(-1)[place] += step * whole.view(-1)[place]
            assert not _weights_reached(use, whole, wrong, weights, layout)
    # what brings nothing says nothing
    assert _weights_reached(use, torch.zeros(use.lead), torch.zeros(use.lead), weights, layout)


def marks_like(*leads, sums=1.0, magnitudes=2.0):
    return [
        torch.stack([torch.full(lead, sums), torch.full(lead, magnitudes)]).double()
        for lead in leads
    ]


USES = {
    "rows": ((4,), Layout()),
    "views": ((3, 8), Layout(1, 2, 1)),
    "a loop": ((5,), Layout(only=2)),
    "unknown": ((4,), None),
}


@pytest.mark.parametrize("sign", [1, -1])
def test_two_gradients_of_one_example_are_refused_at_every_use(sign):
    """Example 2 and no other is of the group; uses without a layout say nothing, wherever they
    stand.
    """
    leads, taps = (
        [lead for lead, _ in USES.values()],
        [tap(lead, layout, name) for name, (lead, layout) in USES.items()],
    )
    group = torch.tensor([False, False, True, False])
    for size, refused in ((1.01, True), (0.99, False)):
        for number, (name, (lead, layout)) in enumerate(USES.items()):
            for order in (list(range(4)), [3, 2, 1, 0]):
                owners = layout.owners(lead, 4) if layout is not None else torch.zeros(1)
                places = (
                    [0]
                    if layout is None or layout.only is not None
                    else (owners == 2).nonzero().flatten().tolist()
                )
                other, third = marks_like(*leads), marks_like(*leads)
                # of its magnitudes, not of its sum
                other[number][0][..., places[-1]] += sign * size * TOLERANCE * 2.0
                third[number][0][..., [p for p in range(lead[-1]) if p not in places]] += 1.0
                pick = lambda marks, order=order: [marks[i] for i in order]  # noqa: E731
                one = marks_like(*leads)
                if layout is None or layout.only is None:
                    same_gradients(pick(taps), pick(one), pick(third), group, TOLERANCE, "another")
                for a, b in ((one, other), (other, one)):
                    if refused and layout is not None:
                        with pytest.raises(UnsupportedLayer, match=f"parameter {name}"):
                            same_gradients(
                                pick(taps), pick(a), pick(b), group, TOLERANCE, "another"
                            )
                    else:
                        same_gradients(pick(taps), pick(a), pick(b), group, TOLERANCE, "another")
    same_gradients(
        taps,
        marks_like(*leads),
        marks_like(*leads, sums=9.0),
        torch.zeros(4, dtype=torch.bool),
        TOLERANCE,
        "another",
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_another_gradient_in_a_smaller_batch_is_refused_at_every_use(sign):
    """Examples 1 and 3 of four; uses whose layout is unknown, of one example alone or of no such
    size say nothing.
    """
    picked = torch.tensor([1, 3])
    uses = {**USES, "positions": ((12,), Layout(0, 1, 3)), "other sizes": ((8,), Layout(0, 2, 1))}
    smaller = {
        "rows": (2,),
        "views": (3, 4),
        "a loop": (5,),
        "unknown": (2,),
        "positions": (4,),
        "other sizes": (6,),
    }
    taps, some = (
        [tap(lead, layout, n) for n, (lead, layout) in uses.items()],
        [tap(smaller[n], None, n) for n in uses],
    )
    whole = marks_like(*(lead for lead, _ in uses.values()))
    # three positions an example here, two in the smaller batch
    whole[4] = whole[4] * torch.tensor([2 / 3])
    for order in (list(range(6)), list(range(5, -1, -1))):
        pick = lambda found, order=order: [found[i] for i in order]  # noqa: E731
        for number, name in enumerate(uses):
            entries = {"rows": 1, "views": 3 * 2, "positions": 2}.get(name)
            for size, refused in ((1.01, entries is not None), (0.99, False)):
                part = marks_like(*smaller.values())
                part[number][0].view(-1)[-1] += sign * size * TOLERANCE * 2.0 * (entries or 100)
                arguments = pick(taps), pick(whole), pick(some), pick(part), picked, 4, TOLERANCE
                if refused:
                    with pytest.raises(UnsupportedLayer, match=f"parameter {name}"):
                        same_in_part(*arguments)
                else:
                    same_in_part(*arguments)
    whole[0][0][[0, 2]] = 9.0  # of those that were not picked
    same_in_part(taps, whole, some, marks_like(*smaller.values()), picked, 4, TOLERANCE)
