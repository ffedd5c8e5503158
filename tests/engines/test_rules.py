"""Every rule, under every exact method, against one backward pass an example in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grape_ray import make_engine, register_rule
from grape_ray.errors import ConfigError, UnsupportedLayer
from tests.support import zoo
from tests.support.methods import GRADIENT
from tests.support.oracle import example_gradients, expected, median_norm, worst


def engine_for(model, method, clip_norm=1.0, **options):
    return make_engine(
        model, method, clip_norm, key=b"contract", rank=3, project_min_numel=100, **options
    )


@pytest.mark.parametrize("method", GRADIENT)
@pytest.mark.parametrize("layer", zoo.LAYERS)
def test_equals_one_backward_pass_an_example(layer, method):
    model, batch = zoo.build_layer(layer), zoo.layer_batch()
    clip = median_norm(model, zoo.layer_loss, batch, 6)
    engine = engine_for(model, method, clip)
    got = engine.clipped_sum(zoo.layer_loss, batch).tensors
    assert worst(got, expected(engine, zoo.layer_loss, batch, 6)) < 1e-9
    # another batch size through what was learned from the first
    longer = zoo.layer_batch(rows=3, length=6, seed=1)
    assert (
        worst(
            engine.clipped_sum(zoo.layer_loss, longer).tensors,
            expected(engine, zoo.layer_loss, longer, 3),
        )
        < 1e-9
    )


@pytest.mark.parametrize("method", GRADIENT)
def test_tied_and_reused_weights_add_before_the_norm(method):
    torch.manual_seed(0)
    model = zoo.Tied().double()

    def loss(model, batch):
        logits = model(batch["ids"])
        return F.cross_entropy(logits.transpose(1, 2), batch["ids"], reduction="none").sum(1)

    for length in (5, 9, 2):  # T changes from batch to batch
        batch = {
            "ids": torch.randint(
                0, zoo.VOCAB, (4, length), generator=torch.Generator().manual_seed(length)
            )
        }
        engine = engine_for(model, method, median_norm(model, loss, batch, 4))
        assert (
            worst(engine.clipped_sum(loss, batch).tensors, expected(engine, loss, batch, 4)) < 1e-9
        )


def test_the_model_is_left_as_it_was():
    model, batch = zoo.build_layer("bare parameters"), zoo.layer_batch()
    before = dict(model.named_parameters())
    next(iter(before.values())).grad = torch.ones_like(next(iter(before.values())))
    engine_for(model, "grape").clipped_sum(zoo.layer_loss, batch)
    after = dict(model.named_parameters())
    assert all(after[n] is p for n, p in before.items())
    assert next(iter(after.values())).grad is not None

    def failing(model, batch):
        model(batch["x"])
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="own"):
        engine_for(model, "grape").clipped_sum(failing, batch)
    assert all(dict(model.named_parameters())[n] is p for n, p in before.items())


def test_probing_consumes_no_random_state():
    model, batch = zoo.build_layer("Linear"), zoo.layer_batch()
    torch.manual_seed(3)
    engine_for(model, "grape").clipped_sum(zoo.layer_loss, batch)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert drawn == torch.rand(1)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        out = self.inner(x)
        return (out[0] if isinstance(out, tuple) else out).pow(2).flatten(1).sum(1)


class Hoard(nn.Module):
    """Keeps a second reference to its parameter and uses that."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))
        self.hoard = [self.weight]

    def forward(self, x):
        return x * self.hoard[0]


class Packed(nn.Module):
    """A recurrent layer over a packed sequence, whose rows lie in the order of time."""

    def __init__(self):
        super().__init__()
        self.inner = nn.GRU(5, 4, batch_first=True)

    def forward(self, x):
        lengths = torch.tensor([x.shape[1]] * x.shape[0])
        return self.inner(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1][0]


class Routed(nn.Module):
    """Sends tokens to a layer by their values: rows that no example owns in order."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        return (
            self.inner(x.flatten(0, 1)[x.flatten(0, 1)[:, 0] > 0]).sum() + x.sum((1, 2))
        ).unsqueeze(1)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Wrapped(Packed()), "packed sequence"),
        (lambda: Wrapped(Hoard()), "not seen"),
        (lambda: Wrapped(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(30))), "batch normalisation"),
        (lambda: Wrapped(Routed()), "picked across examples"),
        (lambda: Wrapped(nn.Embedding(9, 4, max_norm=1.0)), "max_norm"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(build, words):
    torch.manual_seed(0)
    model = build().double()
    batch = (
        zoo.layer_batch() if "Embedding" not in str(model) else {"x": torch.randint(0, 9, (6, 6))}
    )
    with pytest.raises(UnsupportedLayer, match=words) as caught:
        engine_for(model, "grape").clipped_sum(zoo.layer_loss, batch)
    assert "'" in str(caught.value)  # names the layer or parameter


def test_a_user_can_teach_an_operation():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x * weight.pow(3)

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return grad * weight.pow(3), (grad * x * 3 * weight.square()).sum((0, 1))

    def cube(x, weight):
        if torch.overrides.has_torch_function((x, weight)):
            return torch.overrides.handle_torch_function(cube, (x, weight), x, weight)
        return Cube.apply(x, weight)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(12) + 0.5)

        def forward(self, x):
            return cube(x, self.weight)

    torch.manual_seed(0)
    model, batch = zoo.Small(Layer()).double(), zoo.layer_batch()
    with pytest.raises(UnsupportedLayer, match="register_rule"):
        engine_for(model, "dp_adam").clipped_sum(zoo.layer_loss, batch)
    register_rule(
        cube, lambda grad, position, args, kwargs: (grad * args[0] * 3 * args[1].square()).sum(1)
    )
    engine = engine_for(model, "dp_adam", median_norm(model, zoo.layer_loss, batch, 6))
    assert (
        worst(
            engine.clipped_sum(zoo.layer_loss, batch).tensors,
            expected(engine, zoo.layer_loss, batch, 6),
        )
        < 1e-9
    )


def test_a_loss_of_the_wrong_shape_is_named():
    model, batch = zoo.build_layer("Linear"), zoo.layer_batch()
    with pytest.raises(ConfigError, match=r"per_example_loss.*\(6,\)"):
        engine_for(model, "grape").clipped_sum(lambda m, b: zoo.layer_loss(m, b).mean(), batch)
    assert len(example_gradients(model, zoo.layer_loss, batch, 6)) == 6


def _cells(p, x):
    states = (x[:, 1], x[:, 2])
    out = torch.lstm_cell(x[:, 0], states, p.wide, p.wide, b_ih=p.bias, b_hh=p.bias)
    return torch.gru_cell(x[:, 0], out[0], w_ih=p.wide[:12], w_hh=p.wide[:12], b_ih=p.bias[:12])


def _batch_norm(p, x):
    norm = {"training": False, "momentum": 0.1, "eps": 0.1, "cudnn_enabled": False}
    return torch.batch_norm(x.transpose(1, 2), p.scale, p.shift, p.mean, p.var, **norm)


def _gru(p, x):
    weights, spec = [p.wide[:12], p.wide[:12]], {"has_biases": False, "num_layers": 1}
    spec |= {"dropout": 0.0, "train": True, "bidirectional": False, "batch_first": True}
    return torch.gru(x, x[:, 0][None], params=weights, **spec)[0]


SPELLINGS = {
    "mm by keyword": lambda p, x: torch.mm(x.flatten(0, 1), mat2=p.square).view(x.shape),
    "addmm with numbers": lambda p, x: p.shift.addmm(2, 3, x[:, 0], p.square),
    "einsum with a size of 1": lambda p, x: torch.einsum(
        "bij,oij->bo", x[:, :1, :3], p.wide.view(4, 4, 4)[:, :3, :1]
    ),
    "conv2d of one stride": lambda p, x: F.conv2d(
        x.unsqueeze(1), p.filter, p.bias, stride=(1,), padding=[1]
    ),
    "linear with a number as bias": lambda p, x: F.linear(x, p.square, p.shift[0]),
    "batch_norm by keyword": _batch_norm,
    "cells by keyword": _cells,
    "gru by keyword": _gru,
    "torch.embedding": lambda p, x: torch.embedding(p.wide, (x[..., 0] > 0).long(), 1),
    "an operator of torch.ops": lambda p, x: torch.ops.aten.embedding.default(
        p.wide, (x[..., 0] > 0).long(), 1
    ),
    "cat by keyword": lambda p, x: torch.cat(tensors=[x, p.shift.expand(len(x), 1, 4)], dim=1),
    "masked_fill": lambda p, x: x.masked_fill(x > 0, p.shift[0]).masked_fill_(x < -1, p.scale[0]),
    "clone by keyword": lambda p, x: x * torch.clone(input=p.shift),
}


class Spelled(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.square, self.wide = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(16, 4))
        self.scale, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.bias, self.filter = (
            nn.Parameter(torch.randn(16)),
            nn.Parameter(torch.randn(16, 1, 2, 2)),
        )
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, batch):
        out = self.function(self, batch["x"])[: len(batch["x"])]
        return (out.square() / 2 + out).flatten(1).sum(1)


@pytest.mark.parametrize("name", SPELLINGS)
def test_however_an_operation_is_spelled(name):
    torch.manual_seed(0)
    model, batch = Spelled(SPELLINGS[name]).double(), {"x": torch.randn(5, 3, 4).double()}
    for method in GRADIENT:
        engine = engine_for(model, method, median_norm(model, lambda m, b: m(b), batch, 5))
        found = engine.clipped_sum(lambda m, b: m(b), batch).tensors
        assert worst(found, expected(engine, lambda m, b: m(b), batch, 5)) < 1e-9


def _taught(x, weight, gate=None):
    mine = (x, weight) if gate is None else (x, weight, gate)
    if torch.overrides.has_torch_function(mine):
        return torch.overrides.handle_torch_function(_taught, mine, x, weight, gate=gate)
    return x * weight if gate is None else x * weight * gate


@pytest.mark.parametrize(
    ("gradient", "gated", "words"),
    [
        (lambda grad, position, args, kwargs: (grad * args[0]).sum(1), True, "by keyword"),
        (lambda grad, position, args, kwargs: grad * args[0], False, "a gradient of shape"),
    ],
)
def test_a_registered_rule_that_loses_a_gradient_is_refused(gradient, gated, words):
    register_rule(_taught, gradient)
    model, batch = Spelled(None).double(), {"x": torch.randn(5, 3, 4).double()}

    def loss(model, batch):
        gate = F.linear(batch["x"], model.square) if gated else None
        return _taught(batch["x"], model.shift, gate=gate).square().sum((1, 2))

    with pytest.raises(UnsupportedLayer, match=words):
        engine_for(model, "dp_adam").clipped_sum(loss, batch)


def test_a_hook_on_the_gradient_of_a_parameter_is_refused():
    model = nn.Linear(4, 4)
    model.weight.register_hook(lambda grad: grad / 10)
    with pytest.raises(UnsupportedLayer, match="a hook on its gradient"):
        engine_for(model, "dp_adam")
