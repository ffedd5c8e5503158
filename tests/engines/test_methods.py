"""What every method promises: bounded contributions, harmless padding, empty batches, additive
micro-batches, plain Adam.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from grape_ray import make_engine
from grape_ray.config.methods import METHODS
from grape_ray.config.schema import Method
from grape_ray.optim import make_optimizer
from grape_ray.privacy.noise import NoiseStream, nonprivate_mean, privatize
from tests.support import zoo
from tests.support.grants import granted
from tests.support.methods import EXACT, GRADIENT, PRIVATE
from tests.support.oracle import expected, median_norm, norm_of, worst

CLIP_NOTHING = 100.0
FAMILIES = ["OPT (tied)", "BERT", "ViT"]


def engine_for(model, method, clip_norm=1.0, **options):
    return make_engine(
        model, method, clip_norm, key=b"contract", rank=3, project_min_numel=100, **options
    )


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("method", EXACT)
def test_every_clipping_policy_equals_its_definition(method, clipping):
    model, batch = zoo.build_layer("bare parameters"), zoo.layer_batch()
    engine = engine_for(
        model, method, median_norm(model, zoo.layer_loss, batch, 6), clipping=clipping
    )
    assert (
        worst(
            engine.clipped_sum(zoo.layer_loss, batch).tensors,
            expected(engine, zoo.layer_loss, batch, 6),
        )
        < 1e-9
    )


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(family, method, clipping):
    model, loss, make_batch = zoo.build_family(family)
    batch = make_batch()
    engine = engine_for(model, method, 0.37, clipping=clipping)
    whole = engine.clipped_sum(loss, batch)
    assert whole.sensitivity == 0.37
    for out in range(zoo.ROWS):
        rest = {k: torch.cat([v[:out], v[out + 1 :]]) for k, v in batch.items()}
        without = engine.clipped_sum(loss, rest).tensors
        assert norm_of({n: whole.tensors[n] - without[n] for n in without}) <= 0.37 * (1 + 1e-6)
        alone = engine.clipped_sum(loss, {k: v[out : out + 1] for k, v in batch.items()}).tensors
        assert 0 < norm_of(alone) <= 0.37 * (1 + 1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38, 1e30])
@pytest.mark.parametrize("method", PRIVATE)
def test_an_adversarial_record_stays_within_its_bound_and_spoils_no_other(method, bad):
    model = zoo.build_layer("LayerNorm without bias").float()
    batch = {"x": zoo.layer_batch()["x"].float()}
    engine = engine_for(model, method, 1.0)
    good = {"x": batch["x"][1:]}
    clean = engine_for(model, method, 1.0).clipped_sum(zoo.layer_loss, good).tensors
    batch["x"][0] = bad
    spoiled = engine.clipped_sum(zoo.layer_loss, batch).tensors
    assert all(torch.isfinite(t).all() for t in spoiled.values())
    if METHODS[method].exact:
        assert norm_of({n: spoiled[n] - clean[n] for n in clean}) <= 1.0 + 1e-5


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_rows_and_micro_batches_change_nothing(family, method):
    model, loss, make_batch = zoo.build_family(family)
    batch = make_batch()
    engine = engine_for(model, method, median_norm(model, loss, batch, zoo.ROWS))
    whole = engine.clipped_sum(loss, batch).tensors
    padded = {k: torch.cat([v, v[:3]]) for k, v in batch.items()}
    mask = torch.arange(zoo.ROWS + 3) < zoo.ROWS
    assert worst(engine.clipped_sum(loss, padded, mask=mask).tensors, whole) < 1e-9
    halves = [{k: v[s] for k, v in batch.items()} for s in (slice(0, 1), slice(1, None))]
    assert (
        worst(
            (engine.clipped_sum(loss, halves[0]) + engine.clipped_sum(loss, halves[1])).tensors,
            whole,
        )
        < 1e-9
    )


def paid(engine):
    """The probes that a grant for the engine's sums must pay for."""
    return engine.estimated[0] if engine.estimated else 0


@pytest.mark.parametrize("method", PRIVATE)
def test_an_empty_batch_is_zeros_and_is_noised(method):
    model, loss, make_batch = zoo.build_family("RoBERTa")
    engine = engine_for(model, method, 1.0)
    empty = engine.clipped_sum(loss, {k: v[:0] for k, v in make_batch().items()})
    assert all((t == 0).all() for t in empty.tensors.values())
    released = privatize(
        empty,
        NoiseStream(b"e" * 32),
        step=0,
        grant=granted(2.0, probes=paid(engine)),
        expected_batch_size=8,
    )
    assert released.tensors.keys() == {engine.subspace.part(name) for name in engine.params}
    assert all((t != 0).all() for t in released.tensors.values())


@pytest.mark.parametrize("method", [*GRADIENT, "randomized"])
def test_unused_parameters_are_noised_too(method):
    model = zoo.build_layer("unused module")
    engine = engine_for(model, method)
    summed = engine.clipped_sum(zoo.layer_loss, zoo.layer_batch())
    assert (summed.tensors["layer.1.weight"] == 0).all()
    released = privatize(
        summed,
        NoiseStream(b"e" * 32),
        step=0,
        grant=granted(probes=paid(engine)),
        expected_batch_size=8,
    )
    assert (released.tensors["layer.1.weight"] != 0).all()


@pytest.mark.parametrize("method", [m for m in EXACT if METHODS[m].subspace == "identity"])
def test_without_clip_and_noise_every_full_rank_method_is_plain_adamw(method):
    batches = [zoo.layer_batch(seed=s) for s in range(4)]
    # an entry on the noise's grid may be off by 1e-8
    options = Method(name=method, learning_rate=0.01, weight_decay=0.1, eps=1e-3)
    ours, theirs, baseline = (zoo.build_layer("LayerNorm") for _ in range(3))
    engine, plain = engine_for(ours, method, CLIP_NOTHING), engine_for(baseline, "none")
    first = make_optimizer(ours, engine, options, 4)
    third = make_optimizer(baseline, plain, options, 4)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1, eps=1e-3)
    stream = NoiseStream(b"e" * 32)
    for step, batch in enumerate(batches):
        summed = engine.clipped_sum(zoo.layer_loss, batch, step=step)
        assert (summed.unprotected["norms"] < CLIP_NOTHING).all()
        first.step(privatize(summed, stream, grant=granted(1e-22), expected_batch_size=6))
        third.step(
            nonprivate_mean(plain.clipped_sum(zoo.layer_loss, batch, step=step), batch_size=6)
        )
        adamw.zero_grad()
        zoo.layer_loss(theirs, batch).mean().backward()
        adamw.step()
    for model in (ours, baseline):
        assert worst(dict(model.named_parameters()), dict(theirs.named_parameters())) < 1e-7


def test_grape_in_the_identity_subspace_equals_dp_adam():
    model, loss, make_batch = zoo.build_family("GPT-2 (tied)")
    grape = make_engine(model, "grape", 0.5, key=b"k", rank=3, dense=("*",)).clipped_sum(
        loss, make_batch()
    )
    full = make_engine(model, "dp_adam", 0.5).clipped_sum(loss, make_batch())
    assert worst(grape.tensors, full.tensors) == 0


@pytest.mark.parametrize("side", ["in", "out", "smaller"])
@pytest.mark.parametrize("family", ["GPT-2 (tied)", "ViT"])
def test_grape_projects_either_side(family, side):
    model, loss, make_batch = zoo.build_family(family)
    engine = engine_for(
        model, "grape", median_norm(model, loss, make_batch(), zoo.ROWS), side=side, refresh=5
    )
    assert len(engine.subspace.plan) > 8
    for step in (0, 12):
        got = engine.clipped_sum(loss, make_batch(), step=step).tensors
        assert worst(got, expected(engine, loss, make_batch(), zoo.ROWS, period=step // 5)) < 1e-9


class Shapes(TorchDispatchMode):
    """Notes the number of elements of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage().data_ptr()
            for t in tree_flatten((args, kwargs))[0]
            if isinstance(t, torch.Tensor)
        }
        self.made |= {
            t.numel()
            for t in tree_flatten(out)[0]
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in inputs
        }
        return out


def test_dp_grape_never_makes_a_gradient_of_a_weights_size():
    rows, inputs, outputs = 5, 57, 33

    def made_by(method):
        model = torch.nn.Sequential(
            torch.nn.Linear(inputs, outputs), torch.nn.Tanh(), torch.nn.Linear(outputs, inputs)
        )
        engine = make_engine(model, method, 1.0, rank=4, project_min_numel=100)
        batch = torch.randn(rows, 7, inputs)
        # the first call learns the model's shapes
        engine.clipped_sum(lambda m, x: m(x).square().flatten(1).sum(1), batch)
        with Shapes() as seen:
            engine.clipped_sum(lambda m, x: m(x).square().flatten(1).sum(1), batch)
        assert all(p.grad is None for p in model.parameters())
        return seen.made & {inputs * outputs, rows * inputs * outputs}

    assert made_by("grape") == set()
    assert made_by("bookkeeping") == {inputs * outputs}  # the sum alone
    assert made_by("dp_adam") == {inputs * outputs, rows * inputs * outputs}
