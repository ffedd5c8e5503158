"""Randomized clipping: unbiased squared norms with the declared law, exact where it is cheap,
probes that never repeat.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from grape_ray import make_engine
from grape_ray.engines.algebra import sketch
from grape_ray.engines.algebra.factor_pairs import Index
from grape_ray.engines.norm_routes import norm_route, parse_overrides
from grape_ray.engines.randomized import ProbeStream
from grape_ray.errors import ConfigError
from grape_ray.privacy.noise import NoiseStream, privatize
from tests.support import zoo
from tests.support.grants import granted
from tests.support.oracle import example_gradients, norm_of, projected, worst

PROBES, FALSE_ALARM = 6, 1e-6


def estimates(left, right, estimator, trials=400, probes=PROBES):
    stream = ProbeStream(b"p" * 32, probes, shared=False)
    out = []
    for step in range(trials):
        stream.at(step)
        out.append(
            estimator([(left, right)], lambda side: stream.draw(right.shape[0], side, "w", right))
        )
    return torch.stack(out).numpy()


def rank_one(rows=8, positions=5, outputs=40, inputs=30):
    g = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(rows, 1, outputs, generator=g),
        torch.randn(rows, 1, inputs, generator=g),
    )
    weights = torch.rand(rows, positions, 1, generator=g)
    return left * weights, right.expand(-1, positions, -1)


@pytest.mark.statistical
def test_hutchinson_has_the_chi_square_law_on_rank_one_gradients():
    left, right = rank_one()
    truth = torch.bmm(left.transpose(1, 2), right).square().sum((1, 2)).numpy()
    ratio = (estimates(left, right, sketch.hutchinson) / truth * PROBES).ravel()
    assert stats.kstest(ratio, "chi2", (PROBES,)).pvalue > FALSE_ALARM
    for wrong in (PROBES - 1, PROBES + 1):  # the test has power
        assert stats.kstest(ratio, "chi2", (wrong,)).pvalue < FALSE_ALARM
    assert stats.kstest(ratio * 1.1, "chi2", (PROBES,)).pvalue < FALSE_ALARM


@pytest.mark.statistical
@pytest.mark.parametrize("estimator", [sketch.hutchinson, sketch.hutch_plus_plus])
def test_estimates_are_unbiased_and_hutch_plus_plus_is_tighter(estimator):
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(8, 20, 40, generator=g), torch.randn(8, 20, 30, generator=g)
    truth = torch.bmm(left.transpose(1, 2), right).square().sum((1, 2)).numpy()
    ratio = estimates(left, right, estimator) / truth
    z = (ratio.mean() - 1) / (ratio.std() / np.sqrt(ratio.size))
    assert abs(z) < stats.norm.isf(FALSE_ALARM / 2)
    if estimator is sketch.hutch_plus_plus:
        assert ratio.std() < estimates(left, right, sketch.hutchinson).std(0).mean() / truth.mean()


def test_an_embedding_is_sketched_as_its_one_hot_factors_would_be():
    ids, right = torch.randint(0, 9, (3, 7)), torch.randn(3, 7, 5)
    probes = torch.randn(3, 5, PROBES)
    dense = torch.nn.functional.one_hot(ids, 9).float()
    torch.testing.assert_close(
        sketch.sketch(Index(ids, 9), right, probes, True), sketch.sketch(dense, right, probes, True)
    )


def wide_model():
    torch.manual_seed(0)
    return zoo.Small(nn.Linear(60, 60), width=60).double()


def engine_for(model, **options):
    return make_engine(model, "randomized", 0.5, probes=PROBES, **options)


@pytest.mark.parametrize("estimator", ["hutchinson", "hutch++"])
def test_the_sum_is_weighted_by_the_estimate(estimator):
    """Many probes make the estimate sharp, and the sum that of exact clipping."""
    model, batch = wide_model(), zoo.layer_batch(length=30)
    engine = make_engine(
        model, "randomized", 40.0, probes=4000, routes=("*weight:sketch",), estimator=estimator
    )
    got = engine.clipped_sum(zoo.layer_loss, batch).tensors
    exact = make_engine(model, "dp_adam", 40.0).clipped_sum(zoo.layer_loss, batch).tensors
    assert worst(got, exact) < (0.05 if estimator == "hutchinson" else 0.02)
    assert worst(engine_for(model).clipped_sum(zoo.layer_loss, batch).tensors, exact) > 1e-6


def test_tied_weights_share_one_set_of_probes():
    torch.manual_seed(0)
    model = zoo.Tied().double()
    batch = {"ids": torch.randint(0, zoo.VOCAB, (4, 9))}

    def loss(model, batch):
        return model(batch["ids"]).square().flatten(1).sum(1)

    exact = make_engine(model, "dp_adam", 1.0).clipped_sum(loss, batch).tensors
    sharp = (
        make_engine(model, "randomized", 1.0, probes=4000, routes=("*:sketch",))
        .clipped_sum(loss, batch)
        .tensors
    )
    assert worst(sharp, exact) < 0.08


def test_layers_that_are_cheap_are_exact():
    model, batch = zoo.build_layer("bare parameters"), zoo.layer_batch()
    exact = make_engine(model, "dp_adam", 0.5).clipped_sum(zoo.layer_loss, batch).tensors
    routed = (
        make_engine(model, "randomized", 0.5, probes=64).clipped_sum(zoo.layer_loss, batch).tensors
    )
    assert worst(routed, exact) < 1e-9


@pytest.mark.parametrize("shared", [False, True])
def test_probes_are_fresh_and_secret_ones_are_each_examples_own(shared):
    model, batch = wide_model(), zoo.layer_batch(rows=1, length=30)
    twice = {"x": torch.cat([batch["x"], batch["x"]])}
    engine = engine_for(model, shared_probes=shared)
    engine.use_secret(b"s" * 32)

    def factor_of(batch, step):
        return norm_of(engine.clipped_sum(zoo.layer_loss, batch, step=step).tensors)

    first = factor_of(batch, 0)
    assert factor_of(batch, 1) != first
    # a second micro-batch of the same step: new secret probes, the same shared ones
    assert (factor_of(batch, 1) == pytest.approx(factor_of(batch, 1), rel=1e-12)) == shared
    both = factor_of(twice, 2)
    assert (both == pytest.approx(2 * factor_of(batch, 2), rel=1e-9)) == shared
    assert "norms" not in engine.clipped_sum(zoo.layer_loss, batch, step=3).unprotected


def test_ranks_draw_different_secret_probes_and_the_same_shared_ones():
    for shared in (False, True):
        a, b = (ProbeStream(b"s" * 32, 3, shared, rank) for rank in (0, 1))
        a.at(0), b.at(0)
        like = torch.zeros(1)
        assert bool((a.draw(2, 5, "w", like) == b.draw(2, 5, "w", like)).all()) == shared
        assert not torch.equal(a.draw(2, 5, "v", like), b.draw(2, 5, "w", like))


def test_a_zero_estimate_contributes_nothing(monkeypatch):
    engine = engine_for(wide_model(), routes=("*weight:sketch",))
    monkeypatch.setattr(
        engine,
        "_estimator",
        lambda uses, draw: torch.zeros(uses[0][1].shape[0], dtype=torch.float64),
    )
    for param in (p for n, p in engine.model.named_parameters() if n.endswith("bias")):
        param.requires_grad_(False)
        engine.params = {n: p for n, p in engine.params.items() if p is not param}
    assert norm_of(engine.clipped_sum(zoo.layer_loss, zoo.layer_batch(length=30)).tensors) == 0


def test_other_clipping_policies_are_refused():
    with pytest.raises(ConfigError, match="flat"):
        engine_for(wide_model(), clipping="automatic")


@pytest.mark.parametrize(
    ("shape", "probes", "route"),
    [
        ((8, 16, 8), None, "gram"), ((9, 16, 8), None, "instantiate"), ((1, 1, 2), None, "gram"),
        ((64, 768, 768), 383, "sketch"), ((64, 768, 768), 384, "gram"),
        ((4096, 768, 768), 384, "instantiate"), ((1, 768, 768), 32, "sketch"),
        ((4096, 768, 768), 32, "sketch"), ((1, 4, 768), 32, "gram"),
        ((4096, 4, 768), 32, "instantiate"),
    ],
)  # fmt: skip
def test_routing_at_its_boundaries(shape, probes, route):
    assert norm_route(*shape, probes) == route  # pyright: ignore[reportCallIssue]


def test_routes_can_be_overruled_by_name():
    assert parse_overrides(("a.*:gram",), False) == (("a.*", "gram"),)
    for text, estimates_allowed in (("a:sketch", False), ("a:sketcj", True), ("gram", True)):
        with pytest.raises(ConfigError, match="routes"):
            parse_overrides((text,), estimates_allowed)
    model, batch = wide_model(), zoo.layer_batch()
    results = [
        make_engine(model, "bookkeeping", 0.5, routes=(f"*:{r}",)).clipped_sum(
            zoo.layer_loss, batch
        )
        for r in ("gram", "instantiate")
    ]
    assert worst(results[0].tensors, results[1].tensors) < 1e-12


def test_randomized_goes_through_the_noise_line():
    engine = engine_for(wide_model())
    summed = engine.clipped_sum(zoo.layer_loss, zoo.layer_batch())
    assert privatize(
        summed,
        NoiseStream(b"n" * 32),
        step=0,
        grant=granted(probes=engine.probes),  # pyright: ignore[reportAttributeAccessIssue]
        expected_batch_size=6,
    ).noise_std == pytest.approx(0.5 / 6)
    assert projected(
        example_gradients(engine.model, zoo.layer_loss, zoo.layer_batch(), 1)[0], engine.subspace
    )
