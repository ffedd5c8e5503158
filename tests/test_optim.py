"""Optimizers: schedules, moment policies at a refresh, GaLore's subspace, state that survives a
checkpoint.
"""

import pytest
import torch
from torch import nn

from grape_ray import Method, make_engine
from grape_ray.engines.subspace import Gaussian, Projection, Svd, plan_projections
from grape_ray.errors import CheckpointError, ConfigError, GrapeRayError, NoiseReuse
from grape_ray.optim import Optimizer, learning_rate, make_optimizer
from grape_ray.privacy.noise import NoiseStream, privatize
from grape_ray.privacy.types import NonPrivateGradient
from tests.support import zoo
from tests.support.grants import granted

KEY = b"o" * 32


def trained(method, steps=6, resume_at=None, only=None, **options):
    """A small model after some private steps, going through a saved state at `resume_at`."""
    method = Method(name=method, rank=3, project_min_numel=100, learning_rate=0.05, **options)
    model = zoo.build_layer("reused module")
    for name, param in model.named_parameters():
        param.requires_grad_(only in (None, name))
    engine = make_engine(
        model, method.name, 1.0, key=b"o", rank=3, project_min_numel=100, refresh=method.refresh
    )
    optimizer = make_optimizer(model, engine, method, steps)
    stream = NoiseStream(KEY)
    for step in range(steps):
        if step == resume_at:
            state = {
                k: v.clone() if isinstance(v, torch.Tensor) else v
                for k, v in optimizer.state_dict().items()
            }
            optimizer = make_optimizer(model,
            make_engine(model, method.name, 1.0, key=b"o", rank=3, project_min_numel=100,
                                                          refresh=method.refresh), method,
                                                          steps)  # fmt: skip
            optimizer.load_state_dict(state)
        summed = engine.clipped_sum(zoo.layer_loss, zoo.layer_batch(seed=step), step=step)
        optimizer.step(privatize(summed, stream, grant=granted(0.3), expected_batch_size=6))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("moments", ["keep", "reset", "transfer", "lifted"])
@pytest.mark.parametrize("method", ["grape", "dp_galore", "dp_adam"])
def test_a_saved_state_resumes_bitwise(method, moments):
    plain = trained(method, moments=moments, refresh=2)
    for at in (1, 2, 3):
        assert torch.equal(trained(method, moments=moments, refresh=2, resume_at=at), plain)


@pytest.mark.parametrize("method", ["grape", "dp_galore"])
def test_moment_policies_differ_once_the_subspace_changes(method):
    ends = {m: trained(method, moments=m, refresh=2) for m in ("keep", "reset", "transfer")}
    assert not torch.equal(ends["keep"], ends["reset"])
    assert not torch.equal(ends["keep"], ends["transfer"])
    never = {m: trained(method, moments=m, refresh=0) for m in ("keep", "reset")}
    assert torch.equal(never["keep"], never["reset"])


def test_tensors_move_by_their_own_multiple_of_the_rate():
    moved = {}
    for rates in ((), ("*:2",), ("*:2", "layer.*:0.5")):
        method = Method(rank=3, project_min_numel=100, optimizer="sgd", rates=rates)
        model = zoo.build_layer("Linear")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        engine = make_engine(model, "grape", 1.0, rank=3, project_min_numel=100)
        summed = engine.clipped_sum(zoo.layer_loss, zoo.layer_batch())
        gradient = privatize(summed, NoiseStream(KEY), grant=granted(), expected_batch_size=6)
        make_optimizer(model, engine, method, 1).step(gradient)
        moved[rates] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    plain, twice, mixed = moved.values()
    for name, move in plain.items():
        torch.testing.assert_close(twice[name], 2 * move, rtol=1e-3, atol=1e-6)
        multiple = 0.5 if name.startswith("layer.") else 2
        torch.testing.assert_close(mixed[name], multiple * move, rtol=1e-3, atol=1e-6)


def test_a_mean_of_gradients_is_of_one_projection_alone():
    # The one tensor is projected each step in another way: nothing is left to average.
    ends = [trained("grape", only="layer.weight", betas=(b, 0.999)) for b in (0.9, 0.0)]
    torch.testing.assert_close(*ends)
    kept = trained("grape", only="layer.weight", moments="keep")
    assert not torch.allclose(kept, ends[0], atol=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_lifted_mean_goes_on_across_projections(optimizer):
    """Every update is the mean, by hand, of what the same gradients move without momentum."""
    moved = {}
    for kept in (0.0, 0.6):
        options = {"betas": (kept, 0.999)} if optimizer == "adam" else {"momentum": kept}
        method = Method(
            rank=3,
            project_min_numel=100,
            optimizer=optimizer,
            learning_rate=0.05,
            moments="lifted",
            **options,
        )
        model = zoo.build_layer("Linear").requires_grad_(False)
        weight, noise, places = model.get_parameter("layer.weight"), NoiseStream(KEY), []
        weight.requires_grad_(True)
        engine = make_engine(model, "grape", 1.0, key=b"o", rank=3, project_min_numel=100)
        given = make_optimizer(model, engine, method, 4)
        for step in range(4):
            before = weight.detach().clone()
            summed = engine.clipped_sum(zoo.layer_loss, zoo.layer_batch(seed=step), step=step)
            given.step(privatize(summed, noise, grant=granted(0.3), expected_batch_size=6))
            places.append(weight.detach() - before)
            with torch.no_grad():  # it stands still, so that both see the same gradients
                weight.copy_(before)
        moved[kept] = places
    mean = torch.zeros_like(moved[0.0][0])
    for step, (alone, together) in enumerate(zip(*moved.values())):
        if optimizer == "adam":
            mean = 0.6 * mean + 0.4 * alone
            wanted = mean / (1 - 0.6 ** (step + 1))
        else:
            wanted = mean = 0.6 * mean + alone
        torch.testing.assert_close(together, wanted, rtol=1e-3, atol=2e-6)


def test_noise_and_update_are_those_of_the_step_that_was_summed():
    method = Method(name="grape", rank=3, project_min_numel=100, refresh=2)
    model = zoo.build_layer("reused module")
    engine = make_engine(model, "grape", 1.0, rank=3, project_min_numel=100, refresh=2)
    optimizer, noise = (
        make_optimizer(model, engine, method, 9),
        {"grant": granted(), "expected_batch_size": 6},
    )
    before = [p.detach().clone() for p in model.parameters()]
    summed = engine.clipped_sum(zoo.layer_loss, zoo.layer_batch(), step=5)
    with pytest.raises(GrapeRayError, match="step 5, for which it was made"):
        privatize(summed, NoiseStream(KEY), step=0, **noise)
    with pytest.raises(GrapeRayError, match="clipped sums of different mechanisms"):
        summed + engine.empty_sum(4)
    released = privatize(summed, NoiseStream(KEY), **noise)
    assert (released.step, released.period) == (5, 2)
    with pytest.raises(GrapeRayError, match="step 5, for which it was made"):
        optimizer.step(released, 4)
    slower = make_optimizer(
        model,
        make_engine(model, "grape", 1.0, rank=3, project_min_numel=100, refresh=100),
        method,
        9,
    )
    with pytest.raises(GrapeRayError, match=r"period 2., expected period 0 of step 5"):
        slower.step(released)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    optimizer.step(released)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_loop_that_forgets_to_count_its_steps_ends_at_the_second():
    engine, stream = make_engine(zoo.build_layer("Linear"), "dp_adam", 1.0), NoiseStream(KEY)
    privatize(
        engine.clipped_sum(zoo.layer_loss, zoo.layer_batch()),
        stream,
        grant=granted(),
        expected_batch_size=6,
    )
    with pytest.raises(NoiseReuse, match="give clipped_sum each step once"):
        privatize(
            engine.clipped_sum(zoo.layer_loss, zoo.layer_batch()),
            stream,
            grant=granted(),
            expected_batch_size=6,
        )


def test_a_state_of_another_rank_is_refused():
    model = zoo.build_layer("Linear")
    pair = [make_engine(model, "grape", 1.0, rank=r, project_min_numel=100) for r in (3, 4)]
    first, second = (
        make_optimizer(model, e, Method(rank=r, project_min_numel=100), 1)
        for e, r in zip(pair, (3, 4))
    )
    with pytest.raises(CheckpointError, match=r"layer\.weight"):
        second.load_state_dict(first.state_dict())


def test_transfer_keeps_what_two_subspaces_share():
    plan = {"w": Projection(axis=1, dim=400, other=5, rank=300)}
    subspace = Gaussian(plan, b"k", refresh=1)
    weight, coords = torch.zeros(5, 400), torch.randn(5, 300)
    subspace.lift_(weight, "w", 0, coords, 1.0)
    moved = coords @ subspace.change_of_basis("w", 0, 1, weight)
    lifted = torch.zeros(5, 400)
    subspace.lift_(lifted, "w", 1, moved, 1.0)
    assert torch.cosine_similarity(lifted.flatten(), weight.flatten(), 0) > 0.5


@pytest.mark.statistical
def test_the_gaussian_projection_keeps_norms_and_its_lift_is_unbiased():
    """False-alarm rate 1e-6 for the mean of 4000 norms (pinned key)."""
    vector = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    subspace = Gaussian({"w": Projection(1, 50, 1, 8)}, b"k", refresh=1)
    ratios, total = [], torch.zeros(1, 50)
    for period in range(4000):
        coords = vector @ subspace.matrix("w", period, vector)
        ratios.append(float(coords.square().sum() / vector.square().sum()))
        subspace.lift_(total, "w", period, coords, 1 / 4000)
    mean = sum(ratios) / len(ratios)
    assert abs(mean - 1) < 5 * (2 / 8 / 4000) ** 0.5
    assert abs(mean - 1 / 8) > 0.5  # the authors' scale would give 1/r
    assert float((total - vector).norm() / vector.norm()) < 0.1
    paper = Gaussian({"w": Projection(1, 50, 1, 8)}, b"k", refresh=1, scale="paper")
    torch.testing.assert_close(
        paper.matrix("w", 3, vector) * 8**0.5, subspace.matrix("w", 3, vector)
    )


def test_galore_finds_the_leading_directions_of_the_private_gradient():
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 2, generator=g))[0]
    gradient = torch.randn(20, 2, generator=g) @ basis.T
    subspace = Svd({"w": Projection(1, 30, 20, 2)}, refresh=10)
    coords = subspace.project("w", gradient, 0)
    lifted = torch.zeros(20, 30)
    subspace.lift_(lifted, "w", 0, coords, 1.0)
    torch.testing.assert_close(lifted, gradient)
    held = subspace.matrix("w", 0, gradient)
    subspace.project("w", torch.randn(20, 30), 0)
    assert torch.equal(subspace.matrix("w", 0, gradient), held)  # kept within a period


def test_schedules():
    method = Method(learning_rate=1.0, warmup_steps=4, schedule="linear")
    assert [learning_rate(method, s, 14) for s in (0, 1, 3, 4, 9, 14)] == [
        0.25,
        0.5,
        1.0,
        1.0,
        0.5,
        0.0,
    ]
    cosine = Method(learning_rate=2.0, schedule="cosine")
    assert learning_rate(cosine, 5, 10) == pytest.approx(1.0)
    assert learning_rate(Method(learning_rate=0.3), 99, 10) == 0.3


def test_the_known_noise_can_be_taken_out_of_adams_second_moment():
    plain, corrected = trained("dp_adam"), trained("dp_adam", correct_noise_bias=True)
    assert not torch.equal(plain, corrected)
    assert torch.isfinite(corrected).all()


def test_sgd_with_momentum_is_torchs():
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    method = Method(name="none", optimizer="sgd", momentum=0.9, learning_rate=0.1)
    engine = make_engine(model, "none")
    optimizer, reference = (
        make_optimizer(model, engine, method, 3),
        torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9),
    )
    from grape_ray.privacy.noise import nonprivate_mean

    def loss(model, batch):
        return model(batch["x"]).square().sum(1)

    for step in range(3):
        batch = {"x": torch.randn(4, 3)}
        optimizer.step(nonprivate_mean(engine.clipped_sum(loss, batch, step=step), batch_size=4))
        reference.zero_grad()
        loss(twin, batch).mean().backward()
        reference.step()
    torch.testing.assert_close(model.weight, twin.weight)


def test_rank_must_be_below_the_side_it_compresses():
    with pytest.raises(ConfigError, match=r"rank.*'0\.weight'.*64"):
        plan_projections(nn.Sequential(nn.Linear(64, 256)), rank=64)
    assert plan_projections(nn.Sequential(nn.Linear(64, 256)), rank=64, dense=("0.*",)) == {}
    assert (
        plan_projections(nn.Sequential(nn.Linear(64, 256)), rank=64, side="out")["0.weight"].axis
        == 0
    )


SHAPES = {"scalar": (), "vector": (9,), "left": (12, 10), "right": (12, 10), "one": (1, 12, 10)}


def moved(dtype, moments, block, monkeypatch, steps=3):
    """Weights of many shapes, one of them a transposed view, after some steps with projections."""
    monkeypatch.setattr("grape_ray.optim._BLOCK", block)
    made = torch.Generator().manual_seed(0)
    params = {
        name: nn.Parameter(torch.randn(shape, generator=made).to(dtype))
        for name, shape in SHAPES.items()
    }
    params["view"] = nn.Parameter(torch.randn(10, 12, generator=made).to(dtype).T)
    plan = {
        "left": Projection(0, 12, 10, 3),
        "right": Projection(1, 10, 12, 3),
        "one": Projection(0, 12, 10, 3),
    }
    method = Method(rank=3, moments=moments, refresh=1, learning_rate=0.05)
    optimizer = Optimizer(params, Gaussian(plan, b"k", 1), method, steps, b"rounding")
    for step in range(steps):
        tensors = {
            name: torch.randn(plan[name].shape if name in plan else param.shape, generator=made)
            for name, param in params.items()
        }
        optimizer.step(NonPrivateGradient(tensors, step, period=step))
    return {name: param.detach().float() for name, param in params.items()}


@pytest.mark.parametrize("moments", ["reset", "lifted"])
def test_bfloat16_weights_move_by_blocks_as_others_do(moments, monkeypatch):
    exact = moved(torch.float32, moments, 1 << 20, monkeypatch)
    whole = moved(torch.bfloat16, moments, 1 << 20, monkeypatch)
    for block in (1, 25):
        found = moved(torch.bfloat16, moments, block, monkeypatch)
        for name, weight in found.items():
            # blocks round products otherwise, and so a number in a thousand at most
            torch.testing.assert_close(weight, whole[name], rtol=2**-7, atol=1e-3)
            assert (weight != whole[name]).float().mean() < 0.05
    for name, weight in whole.items():
        # three roundings of bfloat16, and the first of the weights themselves
        torch.testing.assert_close(weight, exact[name], rtol=4 * 2**-7, atol=2e-2)
        assert weight.shape == exact[name].shape
