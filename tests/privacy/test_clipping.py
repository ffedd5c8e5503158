"""Whatever the norms, the policy and the padding: what is left of a clipped example is no longer
than the clip norm.
"""

import math

import pytest
import torch

from grape_ray.privacy.clipping import POLICIES, factors

POLICY = pytest.mark.parametrize("policy", list(POLICIES))
CLIP = pytest.mark.parametrize("clip_norm", [0.3, 1.0, 7.0])


def norms(tensors):
    """Squared norms of examples by tensor: nothing at all, one tensor alone, all alike, and from
    tiny to huge.
    """
    generator = torch.Generator().manual_seed(tensors)
    sizes = 10.0 ** torch.empty(200, 1, dtype=torch.float64).uniform_(-12, 12, generator=generator)
    spread = torch.rand(200, tensors, dtype=torch.float64, generator=generator) * sizes
    spread[0], spread[1], spread[2, 1:], spread[3] = 0.0, 1.0, 0.0, 0.3 / math.sqrt(tensors)
    return {f"t{i}": column.square() for i, column in enumerate(spread.T)}


def lengths(squared, made):
    """The norm (B,) of each clipped example, over all tensors."""
    return sum(made[name].square() * s for name, s in squared.items()).sqrt()  # pyright: ignore[reportAttributeAccessIssue]


@POLICY
@CLIP
@pytest.mark.parametrize("tensors", [1, 2, 9])
def test_no_example_is_longer_than_the_clip_norm(policy, clip_norm, tensors):
    squared = norms(tensors)
    made = factors(squared, policy, clip_norm, None)
    assert made.keys() == squared.keys()
    assert (lengths(squared, made) <= clip_norm * (1 + 1e-12)).all()


@POLICY
@CLIP
@pytest.mark.parametrize("names", ["a", "abc"])
def test_a_long_example_fills_the_clip_norm(policy, clip_norm, names):
    squared = {name: torch.tensor([1e8, 1e12], dtype=torch.float64) for name in names}
    assert lengths(squared, factors(squared, policy, clip_norm, None)).tolist() == pytest.approx(
        [clip_norm] * 2, rel=1e-5
    )


@CLIP
def test_a_short_example_is_left_as_it_is_or_finite(clip_norm):
    squared = {
        name: torch.tensor([0.0, (0.4 * clip_norm) ** 2], dtype=torch.float64) for name in "abc"
    }
    for policy in ("flat", "per_layer"):
        assert all((f == 1.0).all() for f in factors(squared, policy, clip_norm, None).values())
    for f in factors(squared, "automatic", clip_norm, None).values():
        assert f.tolist() == pytest.approx(
            [clip_norm / 0.01, clip_norm / (0.4 * clip_norm * math.sqrt(3) + 0.01)]
        )


@POLICY
def test_padding_and_what_is_not_finite_count_for_nothing_and_change_no_other(policy):
    squared = {
        "a": torch.tensor([4.0, 1.0, torch.nan, 9.0, torch.inf]),
        "b": torch.tensor([0.0, 1.0, 1.0, torch.inf, 0.0]),
    }
    squared = {name: s.double() for name, s in squared.items()}
    whole = factors(squared, policy, 1.0, None)
    padded = factors(squared, policy, 1.0, torch.tensor([True, False, True, True, True]))
    for name in squared:
        assert (whole[name][:2] > 0).all()
        assert (whole[name][2:] == 0).all()
        assert padded[name].tolist() == [float(whole[name][0]), 0.0, 0.0, 0.0, 0.0]


@POLICY
def test_a_factor_is_zero_or_no_denormal(policy):
    squared = {"a": torch.tensor([2.0**198, 2.0**202, 2.0**300], dtype=torch.float64)}
    factor = factors(squared, policy, 1.0, None)["a"]
    assert factor[0] > 0
    assert (factor[1:] == 0).all()
