"""No width, length, precision or size hides a contribution in the rounding of its norm, and none
that does not cancel is clipped for it.
"""

import math

import pytest
import torch
from torch import nn

from grape_ray import make_engine
from grape_ray.config.methods import METHODS
from grape_ray.config.schema import MAX_CLIP_NORM, MIN_CLIP_NORM
from grape_ray.engines.algebra import factor_pairs, sketch
from grape_ray.engines.algebra.factor_pairs import Index
from grape_ray.engines.algebra.rounding import (
    BLOCK,
    chain,
    dots,
    gamma,
    matrix_norms,
    products,
    raised,
    squared,
    total_length,
    vector_lengths,
)
from grape_ray.engines.norm_routes import norm_route
from grape_ray.errors import ConfigError
from grape_ray.privacy.clipping import factors
from tests.support.methods import GRADIENT

ROUTES = {"gram": factor_pairs.gram_squared_norms, "instantiate": factor_pairs.outer_squared_norms}
ROUNDED = 1 + 2.0**-22  # of a factor and of a product, in single precision


def true_norm(uses):
    parts = [
        (
            left.outer(right.double())
            if isinstance(left, Index)
            else left.double().transpose(1, 2) @ right.double()
        )
        for left, right in uses
    ]
    return torch.stack(parts).sum(0).flatten(1).norm(dim=1)


def constants(width, tokens, generator):
    """Tokens that nearly cancel and whose inner products are all rounded the same way."""
    c = 1 + float(torch.rand((), generator=generator))
    d = c * (1 + 10 ** float(torch.rand((), generator=generator) * 5 - 7))
    left, right = torch.full((1, tokens, 64), 1e3), torch.full((1, tokens, width), c)
    left[:, 1::2] *= -1
    right[:, 1::2] = d
    return left, right


def cancelling(width, tokens, generator):
    """Random directions that nearly cancel in pairs."""
    near = 10 ** float(-6 * torch.rand((), generator=generator))
    signs = torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0).view(1, -1, 1)
    left = torch.randn(1, 1, 64, generator=generator) * signs
    return left, torch.randn(1, 1, width, generator=generator) + near * torch.randn(
        1, tokens, width, generator=generator
    )


def random(width, tokens, generator):
    return torch.randn(1, tokens, 64, generator=generator), torch.randn(
        1, tokens, width, generator=generator
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("made", [constants, cancelling, random])
@pytest.mark.parametrize("route", ROUTES)
def test_norms_are_never_below_the_truth_at_any_width(route, made, dtype):
    generator = torch.Generator().manual_seed(3)
    for width, tries in ((1, 10), (64, 10), (768, 10), (4096, 20), (16384, 20)):
        for tokens in (2, 6):
            for _ in range(tries):
                left, right = made(width, tokens, generator)
                pair = left.to(dtype), right.to(dtype)
                found = ROUTES[route]([pair]).sqrt()
                assert (true_norm([pair]) <= found * (1 + 1e-8)).all()  # the truth is rounded, too
                scaled = factor_pairs.scaled(pair[0], pair[1], 1 / found)
                assert true_norm([scaled]) <= ROUNDED  # what is summed, in exact arithmetic
                # and as it comes out
                assert factor_pairs.summed(*scaled).double().norm() <= 1 + 1e-6


@pytest.mark.parametrize("method", [m for m in GRADIENT if METHODS[m].subspace != "gaussian"])
def test_wide_layers_contribute_no_more_than_the_clip_norm(method):
    class Weighted(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layer = nn.Linear(width, 64, bias=False)

        def forward(self, batch):
            return (self.layer(batch["x"]) * batch["g"]).flatten(1).sum(1)

    generator = torch.Generator().manual_seed(0)
    for width in (2048, 16384):
        engine = make_engine(Weighted(width), method, 1.0, rank=4)
        for _ in range(20):
            grads, inputs = constants(width, 2, generator)
            summed = engine.clipped_sum(
                lambda model, batch: model(batch), {"x": inputs, "g": grads}
            )
            assert summed.tensors["layer.weight"].double().norm() <= 1 + 1e-6


def test_uses_that_cancel_each_other_hide_nothing():
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        left, right = constants(4096, 2, generator)
        split = [(left[:, :1], right[:, :1]), (left[:, 1:], right[:, 1:])]
        for norms in ROUTES.values():
            assert true_norm(split) <= norms(split).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_are_never_under_normed_where_ids_repeat_and_exact_where_they_do_not(dtype):
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        right = constants(64, 300, generator)[0].to(dtype)
        right += torch.randn(right.shape, generator=generator) * 1e-3
        index = Index(torch.randint(0, 3, (1, 300), generator=generator), 5)
        assert true_norm([(index, right)]) <= factor_pairs.lookup_squared_norms(
            index, right
        ).sqrt() * (1 + 1e-12)
        for norms in ROUTES.values():
            assert true_norm([(index, right)]) <= norms([(index, right)]).sqrt() * (1 + 1e-12)
            assert true_norm([(index, right), (right[..., :5], right)]) <= norms(
                [(index, right), (right[..., :5], right)]
            ).sqrt() * (1 + 1e-12)
    distinct = Index(torch.arange(300).unsqueeze(0), 300)
    found = factor_pairs.lookup_squared_norms(distinct, right).sqrt()
    assert true_norm([(distinct, right)]) <= found <= true_norm([(distinct, right)]) * (1 + 5e-6)


@pytest.mark.parametrize(
    ("tokens", "width"), [(128, 768), (512, 768), (1024, 768), (128, 4096), (1024, 4096)]
)
def test_tokens_of_random_directions_are_clipped_by_little_too_much(tokens, width):
    generator = torch.Generator().manual_seed(0)
    pair = (
        torch.randn(1, tokens, width, generator=generator),
        torch.randn(1, tokens, width, generator=generator),
    )
    found = ROUTES[norm_route(tokens, width, width)]([pair]).sqrt()
    grams = [factor.double() @ factor.double().transpose(1, 2) for factor in pair]
    true = (grams[0] * grams[1]).sum().sqrt()
    assert true <= found <= true * (1 + 1.2e-3)


@pytest.mark.parametrize("numel", [1, 7, 64, 65, 5000, 200_000])
def test_squared_norms_of_any_length_are_tight_from_above(numel):
    generator = torch.Generator().manual_seed(numel)
    for stored in (
        torch.randn(3, numel, generator=generator),
        torch.full((3, numel), 1.1),
        torch.randn(3, numel, generator=generator) * 1e-17,
    ):
        exact = stored.double().square().sum(1)
        assert (exact <= squared(stored)).all()
        assert (squared(stored) <= exact * (1 + 1e-5) + numel * 1.2e-38).all()


def test_what_underflows_is_not_lost():
    size = torch.full((1, 4), 1e-25)
    assert (squared(size).sqrt() >= 2e-25).all()
    # squares of the left factors vanish
    left, right = torch.full((1, 2, 8), 1e-24), torch.full((1, 2, 8), 1e15)
    for norms in ROUTES.values():
        assert (norms([(left, right)]).sqrt() >= true_norm([(left, right)])).all()
    # no subnormal factor
    assert factors({"a": torch.tensor([1e80], dtype=torch.float64)}, "flat", 1e-6, None)["a"] == 0


@pytest.mark.parametrize("method", [*GRADIENT, "randomized"])
def test_gradients_near_the_smallest_floats_contribute_no_more_than_the_least_clip_norm(method):
    engine = make_engine(
        nn.Linear(64, 64, bias=False), method, MIN_CLIP_NORM, rank=2, project_min_numel=20
    )
    for size in (1e-5, 1e-8, 1e-19, 1e-21, 1e-23, 1e-38):
        summed = engine.clipped_sum(
            lambda model, x, size=size: size * model(x).sum(1), torch.ones(1, 64)
        )
        assert summed.tensors["weight"].double().norm() <= MIN_CLIP_NORM * (
            1 + 1e-5 if method != "randomized" else 3
        )


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, 1e-7, 1e-20, 1e13, math.nan, math.inf])
def test_clip_norms_out_of_range_are_refused_by_name(clip_norm):
    with pytest.raises(ConfigError, match="clip_norm"):
        make_engine(nn.Linear(2, 2), "dp_adam", clip_norm)
    make_engine(nn.Linear(2, 2), "dp_adam", MAX_CLIP_NORM)


def test_estimates_are_raised_by_what_cancels():
    generator = torch.Generator().manual_seed(5)
    left, right = constants(4096, 2, generator)
    probes = torch.randn(1, 64, 8, generator=generator) / math.sqrt(8)
    estimate = sketch.hutchinson([(left, right)], lambda _: probes)
    exact = (right.double().transpose(1, 2) @ (left.double() @ probes.double())).norm() ** 2
    assert exact <= sketch.upper_bound(estimate, [(left, right)])


def test_products_keep_their_precision_under_autocast_and_their_bound():
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(2, 5, 3 * BLOCK + 7, generator=generator) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = products(a, b)
    exact = a.double() @ b.double().transpose(1, 2)
    bound = gamma(chain(a.shape[2]), torch.float32) * (
        a.abs().double() @ b.abs().double().transpose(1, 2)
    )
    assert ((found.double() - exact).abs() <= bound).all()
    assert gamma(1 << 24, torch.float32) == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_error_bounds_are_those_of_the_book(dtype):
    half = torch.finfo(dtype).eps / 2
    for terms in (0, 1, 3, 100):
        assert gamma(terms, dtype) == pytest.approx(terms * half / (1 - terms * half), rel=1e-12)
    assert gamma(round(0.5 / half), dtype) == math.inf
    assert gamma(round(0.5 / half) - 1, dtype) == pytest.approx(1, abs=5 * half)
    assert [chain(n) for n in (0, 1, BLOCK, BLOCK + 1, 3 * BLOCK)] == [
        0,
        2,
        BLOCK + 1,
        BLOCK + 2,
        BLOCK + 3,
    ]


def test_lengths_have_room_for_every_rounding_and_for_what_underflowed():
    limits = torch.finfo(torch.float64)
    for terms in (1, 50, 5000):
        (found,) = total_length(torch.tensor([[1.0, 3.0]], dtype=torch.float64), terms).tolist()
        relative = ((found / 2) ** 2 - 1) / (limits.eps / 2)
        assert 2 * terms + 8 <= relative <= 2 * terms + 32
        (floor,) = total_length(torch.zeros(1, 5, dtype=torch.float64), terms).tolist()
        assert gamma(terms, torch.float64) * floor**2 >= 5 * terms * limits.tiny * (1 - 1e-9)
        assert floor**2 <= 5 * 4 * limits.tiny / limits.eps


@pytest.mark.parametrize("shape", [(7,), (3, 64), (2, 3, 1000)])
def test_lengths_of_vectors_are_tight_from_above(shape):
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = vectors.double().square().sum(-1).sqrt()
    assert (exact <= vector_lengths(vectors)).all()
    assert (vector_lengths(vectors) <= exact * (1 + 4 * gamma(shape[-1] + 8, torch.float32))).all()


def test_a_norm_that_is_off_by_an_error_is_raised_by_it():
    assert raised(torch.tensor([9.0, 0.0]), 2.0).tolist() == [25.0, 4.0]
    assert raised(torch.tensor([9.0, 0.0]), torch.tensor([0.0, 1.0])).tolist() == [9.0, 1.0]


def test_squared_norms_have_room_for_every_rounding():
    """Of ones nothing is rounded: what is added to the truth is the bound, of a short block and of
    the sum over blocks.
    """
    for numel, terms in ((1, 1), (64, 64), (64 * 500, 64)):
        ones = torch.ones(2, numel)
        above = (squared(ones) / numel - 1) / (torch.finfo(torch.float32).eps / 2)
        assert ((terms <= above) & (above <= terms + 16)).all()
        (extra,) = squared(torch.ones(1, numel, dtype=torch.float64)).tolist()
        above = (extra / numel - 1) / (torch.finfo(torch.float64).eps / 2)
        assert terms + numel // 64 + 8 <= above <= terms + numel // 64 + 32
        least = squared(torch.zeros(1, numel)).item() / torch.finfo(torch.float32).tiny
        assert least == pytest.approx(numel)


def test_products_of_no_columns_are_zeros():
    found = products(torch.ones(2, 3, 0), torch.ones(2, 4, 0))
    assert torch.equal(found, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 7, 200), (2, 40, BLOCK + 3)])
def test_sums_of_products_and_norms_of_matrices_keep_their_bounds(shape):
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e-22):  # the squares of the second underflow
        a, b = (scale * torch.randn(shape, generator=generator) for _ in range(2))
        exact = torch.linalg.matrix_norm(a.double()), torch.linalg.matrix_norm(b.double())
        for norms, true in zip((matrix_norms(a), matrix_norms(b)), exact):
            assert (true <= norms).all()
        total, off = dots(a, b)
        underflow = shape[1] * shape[2] * torch.finfo(torch.float32).tiny
        assert (
            (total - (a.double() * b.double()).sum((1, 2))).abs()
            <= off * exact[0] * exact[1] + underflow
        ).all()
        assert off <= gamma(min(shape[2], BLOCK) + 2, torch.float32)
    rounded = matrix_norms(torch.ones(shape)) / math.sqrt(shape[1] * shape[2]) - 1
    # the roots round, too
    assert ((shape[2] + 6) * torch.finfo(torch.float32).eps / 2 <= rounded).all()
    assert (rounded <= (shape[2] + 20) * torch.finfo(torch.float32).eps / 2).all()


def test_inner_products_that_cancel_are_covered_by_what_is_added():
    """Two positions that cancel: what is left is rounding alone, and the bound on it is that of the
    book, for every pair of widths.
    """
    for width in (64, BLOCK, 2048):
        left, right = constants(width, 2, torch.Generator().manual_seed(width))
        found = factor_pairs.gram_squared_norms([(left, right)])
        magnitude = factor_pairs.magnitudes([(left, right)])
        lost = gamma(chain(64), torch.float32) + gamma(chain(width), torch.float32)
        assert (found >= 0.99 * lost * magnitude**2).all()


def test_long_sums_are_taken_in_double_precision_and_have_room_for_it():
    rows = torch.ones(1, 102, 1)
    rows[0, 0] = 2.0**24  # beside ones: no single-precision number holds the sum
    assert dots(rows, torch.ones_like(rows))[0].item() == 2**24 + 101
    assert total_length(rows[:, :, 0], 1).dtype is torch.float64
    assert total_length(rows[:, :, 0], 1).item() ** 2 >= 2**24 + 101
    half = torch.finfo(torch.float64).eps / 2
    for height, width in ((500, 3), (3, 500)):
        ones = torch.ones(1, height, width, dtype=torch.float64)
        assert (dots(ones, ones)[1] / half) >= height + width
        assert (dots(ones, ones)[1] / half) <= height + width + 20
        above = (matrix_norms(ones).item() / math.sqrt(height * width) - 1) / half
        assert height + width + 10 <= above <= height + width + 30
        floor = matrix_norms(torch.zeros(1, height, width)).item()
        assert floor == pytest.approx(
            math.sqrt(height * width * torch.finfo(torch.float32).tiny), rel=1e-6, abs=0
        )
