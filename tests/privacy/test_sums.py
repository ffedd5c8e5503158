"""Clipped sums of micro-batches add up, and only those of one mechanism; the baseline's mean is
plain.
"""

import pytest
import torch

from grape_ray.errors import GrapeRayError
from grape_ray.privacy.noise import nonprivate_mean
from grape_ray.privacy.types import ClippedSum, PrivateGradient


def summed(value, sensitivity=2.0, names="ab", **unprotected):
    return ClippedSum(
        {n: torch.full((2, 3), float(value)) for n in names}, sensitivity, unprotected
    )


def test_sums_of_disjoint_examples_add_up_at_the_same_sensitivity():
    whole = (
        summed(1, norms=torch.ones(2), only=1)
        + summed(2, norms=torch.zeros(3))
        + summed(4, norms=torch.ones(1))
    )
    assert whole.sensitivity == 2.0
    assert whole.tensors.keys() == {"a", "b"}
    assert all((t == 7).all() for t in whole.tensors.values())
    # in the examples' order
    assert torch.cat(whole.unprotected["norms"]).tolist() == [1, 1, 0, 0, 0, 1]
    assert "only" not in whole.unprotected


@pytest.mark.parametrize(
    "other",
    [
        summed(1, sensitivity=2.5),
        summed(1, names="abc"),
        summed(1, names="a"),
        summed(1, names="ac"),
    ],
)
def test_sums_of_two_mechanisms_do_not_add_up(other):
    for first, second in ((summed(1), other), (other, summed(1))):
        with pytest.raises(GrapeRayError):
            first + second
    assert all((t == 1).all() for t in other.tensors.values())


def test_the_baseline_divides_by_the_batch_and_by_one_where_it_is_empty():
    made = nonprivate_mean(summed(6), step=3, batch_size=4)
    assert made.step == 3
    assert made.noise_std == 0.0
    assert {n: t.flatten().tolist() for n, t in made.tensors.items()} == dict.fromkeys(
        "ab", [1.5] * 6
    )
    assert (nonprivate_mean(summed(6), step=3, batch_size=0).tensors["a"] == 6).all()


@pytest.mark.parametrize("door", [(), (None,), (object(),), (True,)])
def test_a_private_gradient_is_not_made_by_hand(door):
    with pytest.raises(GrapeRayError, match="privatize"):
        PrivateGradient({}, 0, 1.0, *door)
