"""Laws of regular layouts, against entries that are counted one by one."""

import itertools

import pytest
import torch

from grape_ray.engines.capture import row_layout
from grape_ray.engines.capture.row_layout import Layout

ROWS = pytest.mark.parametrize("rows", [1, 2, 3])


def regular(rows):
    """(lead, layout) with examples on every axis, alone and as several views and positions."""
    for axis, outer, inner in itertools.product(range(3), (1, 2), (1, 3)):
        lead = [2, 1, 3]
        lead[axis] = outer * rows * inner
        yield tuple(lead), Layout(axis, outer, inner)


def owner(layout, rows, place):
    """Entry j of the axis belongs to example j // inner % B."""
    return layout.only if layout.only is not None else place[layout.axis] // layout.inner % rows


@ROWS
@pytest.mark.parametrize("features", [(), (2, 2)])
def test_each_example_gets_its_own_positions_and_no_others(rows, features):
    for lead, layout in [*regular(rows), ((3, 2), Layout(only=rows - 1))]:
        tensor = torch.randn(*lead, *features, dtype=torch.float64)
        mine = {
            i: [
                tensor[p]
                for p in itertools.product(*map(range, lead))
                if owner(layout, rows, p) == i
            ]
            for i in range(rows)
        }
        parts = layout.by_example(tensor, len(lead), rows)
        sums = layout.summed(tensor, len(lead), rows)
        assert sums.shape == (rows, *features)
        assert parts.shape[0] == rows
        assert parts.shape[2:] == features
        for i, positions in mine.items():
            whole = (
                torch.stack(positions)
                if positions
                else torch.zeros(1, *features, dtype=torch.float64)
            )
            torch.testing.assert_close(sums[i], whole.sum(0))
            torch.testing.assert_close(parts[i].sum(0), whole.sum(0))
            torch.testing.assert_close(parts[i].square().sum(), whole.square().sum())
            if positions and layout.only is None:  # the same positions, each once
                assert torch.equal(parts[i].flatten().sort().values, whole.flatten().sort().values)


@ROWS
def test_owners_are_as_the_layout_says(rows):
    for lead, layout in regular(rows):
        owned = layout.owners(lead, rows)
        assert owned.tolist() == [j // layout.inner % rows for j in range(lead[layout.axis])]
    assert Layout(only=rows - 1).owners((7,), rows).tolist() == [rows - 1]


@ROWS
def test_a_layout_for_another_size_is_the_same_order_or_none(rows):
    for lead, layout in regular(rows):
        assert layout.fitted(lead, rows) == layout
        for size in range(1, 40):
            changed = (*lead[: layout.axis], size, *lead[layout.axis + 1 :])
            fitted = layout.fitted(changed, rows)
            if fitted is None:
                # only what was seen to be several may be another number
                grows = layout.outer == 1 and layout.inner > 1
                assert size % rows or (size != lead[layout.axis] and not grows)
                continue
            assert fitted.axis == layout.axis
            assert fitted.outer * rows * fitted.inner == size
            assert fitted.outer == layout.outer  # views stay views
            assert fitted.inner == layout.inner or layout.outer == 1
        assert layout.fitted(lead[: layout.axis], rows) is None
    assert Layout(only=0).fitted((5,), rows) == Layout(only=0)


@ROWS
def test_candidates_are_all_layouts_that_the_sizes_allow_each_once_and_the_usual_first(rows):
    for lead in ((rows,), (rows * 6, 5), (5, rows * 4), (rows * 2, rows * 9), (0, rows)):
        found = list(row_layout.candidates(lead, rows))
        allowed = {
            Layout(axis, outer, inner)
            for axis, size in enumerate(lead)
            for outer, inner in itertools.product(range(1, 60), repeat=2)
            if outer * rows * inner == size
        }
        assert len(found) == len(set(found))
        assert set(found) == allowed | {Layout(only=i) for i in range(rows)}
        regular_ones = [layout for layout in found if layout.only is None]
        assert found[: len(regular_ones)] == regular_ones
        assert regular_ones[0].outer == 1


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_one_gradient_in_a_row_of_another_is_a_contradiction(rows):
    """Law: evidence agrees with a layout where, and only where, no group reaches a row that none of
    its examples owns.
    """
    groups = row_layout.every_pair(rows)
    layouts = [(lead, layout) for lead, layout in regular(rows)] + [
        ((2, 3), Layout(only=i)) for i in range(rows)
    ]
    layouts += [((rows * 6,), Layout(0, outer, 6 // outer)) for outer in (1, 2, 6)]
    for lead, layout in layouts:
        places = list(itertools.product(*map(range, lead)))
        nothing = torch.zeros(len(groups), *lead, dtype=torch.bool)
        assert row_layout.agrees(layout, nothing, groups)
        for k in range(len(groups)):
            for place in places[:: max(len(places) // 12, 1)]:
                one = nothing.clone()
                one[(k, *place)] = True
                assert row_layout.agrees(layout, one, groups) == bool(
                    groups[k, owner(layout, rows, place)]
                )


def test_evidence_that_fits_nothing_is_resolved_to_nothing():
    groups = row_layout.every_pair(3)
    assert row_layout.consistent(torch.ones(len(groups), 3, dtype=torch.bool), groups) == []
    assert row_layout.consistent(torch.zeros(len(groups), 3, 2, dtype=torch.bool), groups) == [
        Layout()
    ]
    assert row_layout.consistent(torch.zeros(len(groups), 5, dtype=torch.bool), groups) == [
        Layout(only=i) for i in range(3)
    ]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 33])
def test_of_every_two_examples_one_is_in_a_group_without_the_other(rows):
    groups = row_layout.every_pair(rows)
    assert groups.dtype == torch.bool
    assert len(groups) == 2 * max((rows - 1).bit_length(), 1)  # few backward passes
    for i, j in itertools.permutations(range(rows), 2):
        assert bool((groups[:, i] & ~groups[:, j]).any())


@pytest.mark.parametrize("rows", [2, 3, 8, 33])
def test_a_random_half_is_half_of_the_examples_and_every_example_is_as_likely_in_it(rows):
    first = torch.stack([row_layout.random_halves(rows)[0] for _ in range(400)])
    for half, rest in (row_layout.random_halves(rows) for _ in range(20)):
        assert torch.equal(half, ~rest)
        assert int(half.sum()) == (rows + 1) // 2
    share = (rows + 1) // 2 / rows
    spread = (share * (1 - share) / 400) ** 0.5
    assert ((first.float().mean(0) - share).abs() < 6 * spread).all()  # a false alarm in 10^7 runs
    together = (first[:, 0] == first[:, 1]).float().mean()
    assert together < 0.75  # two examples are told apart at least every other time or so
