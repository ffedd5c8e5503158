"""Method dp_zero: slopes by two forward passes, clipped together, each a function of its own
example; an update along public directions.
"""

import math

import pytest
import torch
from torch import nn

from grape_ray import Method, make_engine
from grape_ray.config.schema import Performance, Privacy
from grape_ray.engines.dp_zero import DpZero
from grape_ray.engines.subspace import Subspace
from grape_ray.errors import ConfigError, UnsupportedLayer
from grape_ray.optim import Optimizer, make_optimizer
from grape_ray.privacy.noise import NoiseStream, privatize
from grape_ray.training.checks import check_machine
from grape_ray.training.preflight import preflight
from tests.support import zoo
from tests.support.grants import granted
from tests.support.oracle import example_gradients, expected, one_of, worst
from tests.support.tiny import tiny

ROWS, WIDTH = 6, 12


def engine_for(model, clip_norm=1.0, **options) -> DpZero:
    engine = make_engine(model, "dp_zero", clip_norm, key=b"zero", **options)
    assert isinstance(engine, DpZero)
    return engine


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def batch_of(rows=ROWS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator)}


def loss(model, batch):
    return 3 * model(batch["x"]).flatten(1).sum(1).square()


def text(family):
    model, family_loss, make_batch = zoo.build_family(family)
    return model, family_loss, make_batch(rows=ROWS)


MADE = {
    "network": lambda: (network(), loss, batch_of()),
    "BERT": lambda: text("BERT"),
    "GPT-2 (tied)": lambda: text("GPT-2 (tied)"),
}


@pytest.mark.parametrize("made", MADE)
def test_slopes_are_directional_derivatives_of_one_example_each(made):
    """A difference of losses is off by its square in the smoothing, which two of them take away."""
    model, of_example, batch = MADE[made]()
    coarse, fine = (
        engine_for(model, 1e9, directions=3, smoothing=s, refresh=5) for s in (2e-4, 1e-4)
    )
    grads = example_gradients(model, of_example, batch, ROWS)
    for step in (0, 7):
        wanted = [
            sum(
                float((g * fine.subspace.direction(name, number, step // 5, g)).sum())
                for example in grads
                for name, g in example.items()
            )
            / math.sqrt(3)
            for number in range(3)
        ]
        one, two = (made.clipped_sum(of_example, batch, step=step) for made in (coarse, fine))
        assert (one.period, one.tensors["slopes"].shape) == (step // 5, (3,))
        found = (4 * two.tensors["slopes"] - one.tensors["slopes"]) / 3
        assert worst({"slopes": found}, {"slopes": torch.tensor(wanted).double()}) < 1e-6


def test_a_sum_is_that_of_single_examples_and_each_is_clipped_by_its_vectors_norm():
    model, batch = network(), batch_of()
    loose = engine_for(model, 1e9, directions=4).clipped_sum(loss, batch)
    clip_norm = float(loose.unprotected["norms"].median())
    engine = engine_for(model, clip_norm, directions=4)
    alone = [
        engine.clipped_sum(loss, one_of(batch, index, ROWS)).tensors["slopes"]
        for index in range(ROWS)
    ]
    whole = engine.clipped_sum(loss, batch)
    assert worst(whole.tensors, {"slopes": torch.stack(alone).sum(0)}) < 1e-11
    assert worst(whole.tensors, expected(engine, loss, batch, ROWS)) < 1e-9
    norms = torch.stack(alone).norm(dim=1)
    assert (norms <= clip_norm).all()
    clipped = norms > clip_norm * (1 - 1e-9)
    assert clipped.sum() == ROWS // 2 + 1
    assert torch.equal(whole.unprotected["norms"] >= clip_norm, clipped)


@pytest.mark.parametrize("layer", ["LSTM, two layers, both ways, projected, time-major",
                                   "weight norm (computed weight)", "einsum (vmap)",
                                   "reused module"])  # fmt: skip
def test_any_layer_is_moved_whole(layer):
    model, batch = zoo.build_layer(layer), zoo.layer_batch()
    engine = engine_for(model, 2.0)
    got = engine.clipped_sum(zoo.layer_loss, batch).tensors
    assert worst(got, expected(engine, zoo.layer_loss, batch, 6)) < 1e-8


def test_weights_are_never_written_to_and_no_graph_is_kept():
    model, graphs = network(), []
    before = {name: (param, param._version, param.clone()) for name, param in
              model.named_parameters()}  # fmt: skip
    engine = engine_for(model)

    def watched(m, batch):
        losses = loss(m, batch)
        graphs.append(losses.requires_grad)
        return losses

    engine.clipped_sum(watched, batch_of())

    def failing(m, batch):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        engine.clipped_sum(failing, batch_of())
    assert not any(graphs)
    for name, param in model.named_parameters():
        known, version, values = before[name]
        assert param is known
        assert param.requires_grad
        assert param.grad is None
        assert param._version == version
        assert torch.equal(param, values)


def test_both_ends_of_a_direction_see_the_same_dropout():
    model = nn.Sequential(network(), nn.Flatten(), nn.Dropout(0.5)).train()
    batch, options = batch_of(16), {"directions": 2}
    engine = engine_for(model, 1e9, **options)
    for _ in range(2):  # verified the first time
        torch.manual_seed(3)
        got = engine.clipped_sum(lambda m, b: m(b["x"]).sum(1), batch).tensors
        after = torch.rand(1)
        torch.manual_seed(3)
        kept = nn.functional.dropout(torch.ones(16, 1, dtype=torch.float64)).flatten()
        assert 0 < kept.count_nonzero() < 16
        assert torch.equal(torch.rand(1), after)  # as after one pass
        plain = engine_for(model.eval(), 1e9, **options)
        wanted = plain.clipped_sum(
            lambda m, b: m(b["x"]).sum(1) * b["kept"], {**batch, "kept": kept}
        ).tensors
        model.train()
        assert worst(got, wanted) < 1e-9


class Mixing(nn.Module):
    """Looks at the other examples in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.how, self.seen = nn.Linear(WIDTH, 4).double(), how, []
        self.norm = nn.BatchNorm1d(4).double() if how == "norm" else nn.Identity()

    def forward(self, x):
        out = self.inner(x)
        if self.how == "mean":
            out = out - out.mean(0)
        if self.how == "count":
            out = out / len(x)
        if self.how == "draw":
            out = out * torch.rand((), dtype=out.dtype)
        if self.how == "order":
            first = int((x[:, 0] > 0).long().argmax())
            out = out.roll(first, 0)
        if self.how == "memory":
            self.seen.append(out.detach().mean(0))
            out = out + self.seen[0]
        return self.norm(out)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("mean", "another value beside other examples"),
        ("order", "another value beside other examples"),
        ("count", "its value in a smaller batch"),
        ("draw", "one that several examples share"),
        ("memory", "'seen' is written to"),
    ],
)
def test_a_model_in_which_examples_meet_is_refused(how, message):
    model = Mixing(how)
    with pytest.raises(UnsupportedLayer, match=message):
        engine_for(model).clipped_sum(loss, batch_of())
    assert all(isinstance(param, nn.Parameter) for param in model.inner._parameters.values())


def test_batch_normalisation_is_refused_in_training_mode():
    with pytest.raises(UnsupportedLayer, match="'norm' in training mode"):
        engine_for(Mixing("norm").train())


def test_operations_that_no_pass_has_shown_are_verified_when_they_come():
    def branching(model, batch):
        losses = loss(model, batch)
        return losses - losses.mean() if bool(batch["flag"].any()) else losses

    engine, batch = engine_for(network()), batch_of()
    batch["flag"] = torch.zeros(ROWS, dtype=torch.int64)
    engine.clipped_sum(branching, batch)
    batch["flag"][0] = 1
    with pytest.raises(UnsupportedLayer, match="another value"):
        engine.clipped_sum(branching, batch)


def test_numbers_that_leave_torch_have_every_pass_verified():
    def ordered(model, batch):
        return loss(model, {"x": batch["x"].roll(int(batch["first"][0]), 0)})

    engine, batch = engine_for(network()), batch_of()
    batch["first"] = torch.zeros(ROWS, dtype=torch.int64)
    engine.clipped_sum(ordered, batch)
    batch["first"][0] = 1  # as before in all but what the batch says
    with pytest.raises(UnsupportedLayer, match="another value"):
        engine.clipped_sum(ordered, batch)


def test_known_passes_are_not_verified_again():
    passes = []

    def counted(model, batch):
        passes.append(len(batch["x"]))
        return loss(model, batch)

    engine = engine_for(network(), directions=2)
    engine.clipped_sum(counted, batch_of())
    assert len(passes) > 4
    passes.clear()
    engine.clipped_sum(counted, batch_of(9), step=1)
    assert passes == [9] * 4


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-3, 1.0, 1e3])
def test_slopes_that_are_all_rounding_pass_the_preflight(scale):
    model = network().float()
    batch = {"x": batch_of()["x"].float()}

    def flat(m, b):
        return 1 + scale * loss(m, b)

    for key in range(3):
        method = Method(name="dp_zero")
        report = preflight(model, flat, batch, Privacy(), method, bytes([key]))
        assert (report.method, report.coordinates) == ("dp_zero", 1)


def test_an_update_moves_all_weights_along_the_directions():
    model = network()
    method = Method(name="dp_zero", directions=2, learning_rate=0.1, rates=("2.*:3",),
                    weight_decay=0.5)  # fmt: skip
    engine = engine_for(model, directions=2)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = make_optimizer(model, engine, method, 1)
    summed = engine.clipped_sum(loss, batch_of(), step=4)
    released = privatize(summed, NoiseStream(b"z" * 32), grant=granted(), expected_batch_size=6)
    assert released.tensors.keys() == {"slopes"}
    optimizer.step(released)
    for name, param in model.named_parameters():
        rate = 0.3 if name.startswith("2.") else 0.1
        moves = sum(
            number * engine.subspace.direction(name, k, 4, param)
            for k, number in enumerate(released.tensors["slopes"] / math.sqrt(2))
        )
        assert worst({"w": param}, {"w": 0.95 * before[name] - rate * moves}) < 1e-12
    assert optimizer.state_dict() == {"updates": 1, "period": 4}


def test_it_learns_where_there_is_no_noise():
    model, batch = nn.Linear(WIDTH, 1).double(), batch_of(32)
    target = batch["x"][:, :3].sum(1)

    def residual(m, b):
        return (m(b["x"]).squeeze(1) - b["y"]).square()

    batch["y"] = target
    engine = engine_for(model, 100.0)
    optimizer = make_optimizer(model, engine, Method(name="dp_zero", learning_rate=0.01), 300)
    start, stream = residual(model, batch).mean(), NoiseStream(b"z" * 32)
    for step in range(300):
        summed = engine.clipped_sum(residual, batch, step=step)
        optimizer.step(privatize(summed, stream, grant=granted(1e-22), expected_batch_size=32))
    assert residual(model, batch).mean() < start / 50


@pytest.mark.parametrize("options", [{"optimizer": "adam"}, {"momentum": 0.9}])
def test_means_over_directions_are_refused(options):
    with pytest.raises(ConfigError, match="sgd without momentum"):
        Method(name="dp_zero", **options)
    engine = engine_for(network())
    with pytest.raises(ConfigError, match="sgd without momentum"):
        make_optimizer(engine.model, engine, Method(**{"optimizer": "sgd", **options}), 1)
    assert Method(name="dp_zero").optimizer_name == "sgd"
    assert Method(name="grape").optimizer_name == "adam"
    assert isinstance(
        Optimizer(engine.params, Subspace(), Method(**{"optimizer": "sgd", **options}), 1),
        Optimizer,
    )


def test_half_precision_and_sharded_weights_are_refused():
    with pytest.raises(ConfigError, match=r"parameter '0\.weight' with method `dp_zero`"):
        engine_for(network().bfloat16())

    def in_bf16(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch).double()

    with pytest.raises(ConfigError, match="products in half precision"):
        engine_for(network().float()).clipped_sum(in_bf16, {"x": batch_of()["x"].float()})
    config = tiny().override(["method.name=dp_zero"])
    for performance, message in (
        (Performance(precision="bf16"), "fp32: a slope is a small difference"),
        (Performance(sharded=True, num_workers=1), "dp_zero.*one of grape"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_machine(type(config)(config.task, method=config.method, performance=performance))
