"""A layer that the engine is taught, as CONTRIBUTING.md shows it; and which function is whose."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import (
    get_overridable_functions,
    handle_torch_function,
    has_torch_function,
    resolve_name,
)

from grape_ray import make_engine, register_rule
from grape_ray.engines.capture.rule import Rule
from grape_ray.engines.capture.torch_functions import is_in_place, operation
from grape_ray.engines.rules.table import HANDLERS
from grape_ray.errors import UnsupportedLayer
from tests.support import zoo
from tests.support.oracle import expected, median_norm, worst


def prelu_gradient(grad, position, args, kwargs):
    """Each example's gradient in the slopes of F.prelu: (B, 1), or (B, C) for one a channel."""
    x, slopes = args
    by_channel = (grad * x.clamp(max=0)).flatten(2).sum(2)  # x is (B, C, ...)
    return by_channel if slopes.numel() > 1 else by_channel.sum(1, keepdim=True)


def scaled_linear(x, weight, bias, scale=1.0):
    """scale * (x W^T + b), an operation of one's own."""
    if has_torch_function((x, weight, bias)):
        return handle_torch_function(scaled_linear, (x, weight, bias), x, weight, bias, scale=scale)
    return scale * F.linear(x, weight, bias)


SCALED_LINEAR = Rule(
    forward=lambda args, settings: (scaled_linear(*args, **settings), (args[1],)),
    factors=lambda grad, x, settings: (settings["scale"] * grad, x),
    project=lambda x, matrix, settings: x @ matrix,
    input_gradient=lambda grad, saved, settings: settings["scale"] * grad @ saved[0],
    casts=True,
)


@pytest.fixture
def table():
    """The table of handlers, which is put back afterwards."""
    before = dict(HANDLERS)
    yield HANDLERS
    HANDLERS.clear()
    HANDLERS.update(before)


class Scaled(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 12)), nn.Parameter(torch.randn(12))
        self.call = call

    def forward(self, x):
        return self.call(x, self.weight, self.bias)


def is_right(layer, method):
    torch.manual_seed(0)
    model, batch = zoo.Small(layer).double(), zoo.layer_batch()
    options = {"rank": 3, "project_min_numel": 100} if method == "grape" else {}
    clip = median_norm(model, zoo.layer_loss, batch, 6)
    engine = make_engine(model, method, clip, key=b"contract", **options)
    got = engine.clipped_sum(zoo.layer_loss, batch).tensors
    return worst(got, expected(engine, zoo.layer_loss, batch, 6)) < 1e-9


@pytest.mark.parametrize("method", ["grape", "dp_adam", "ghost", "bookkeeping"])
@pytest.mark.parametrize("slopes", [1, 6])
def test_a_gradient_by_example_is_one_pure_function(table, method, slopes):
    register_rule(F.prelu, prelu_gradient)
    assert is_right(nn.PReLU(slopes), method)


@pytest.mark.parametrize("method", ["grape", "dp_adam", "ghost", "bookkeeping"])
def test_a_weight_can_stay_a_pair_of_factors(table, method):
    register_rule(scaled_linear, SCALED_LINEAR)
    assert is_right(Scaled(lambda x, w, b: scaled_linear(x, w, b, scale=0.5)), method)
    # a second trainable tensor where the rule has no place for it: another way, or none
    assert is_right(Scaled(lambda x, w, b: scaled_linear(x, w * 2, b, scale=0.5)), method)


def test_a_parameter_given_by_keyword_is_not_lost(table):
    register_rule(F.prelu, prelu_gradient)

    class Keyword(nn.PReLU):
        def forward(self, x):
            return F.prelu(x, weight=self.weight)

    with pytest.raises(UnsupportedLayer, match="keyword"):
        is_right(Keyword(), "dp_adam")


def linear(x, weight, bias):
    """Not torch's: it adds up over the inputs, and then one."""
    if has_torch_function((x, weight, bias)):
        return handle_torch_function(linear, (x, weight, bias), x, weight, bias)
    return F.linear(x, weight * weight, bias) + 1


def test_a_function_that_is_called_as_one_of_torchs_is_not_taken_for_it():
    assert operation(linear) != operation(F.linear) == "linear"
    assert is_right(Scaled(linear), "dp_adam")


class Normalised(nn.Module):
    def __init__(self, training):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))
        self.training_mode = training
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x):
        fixed = (None, None) if self.training_mode else (self.mean, self.var)
        return torch.batch_norm(
            x, self.weight, self.bias, *fixed, self.training_mode, 0.1, 1e-5, False
        )


def test_arguments_in_another_order_than_in_the_functional_namesake_are_read_right():
    assert is_right(Normalised(training=False), "grape")
    with pytest.raises(UnsupportedLayer, match="batch normalisation"):
        is_right(Normalised(training=True), "grape")
    look_up = Scaled(lambda x, w, b: x + torch.embedding(w, (x[..., 0].abs() * 9).long() % 12) + b)
    assert is_right(look_up, "grape")


def test_each_of_torchs_functions_is_known_by_object():
    known = {func for found in get_overridable_functions().values() for func in found}
    for func in known:
        path = resolve_name(func) or ""
        if path.startswith(("torch.Tensor.", "torch.nn.functional.")) and "__get__" not in path:
            raw = path.rpartition(".")[2]
            assert "." not in operation(func), path
            ends = raw.endswith("_") and not raw.startswith("__")
            assert is_in_place(func) or not ends, path
    for name in ("add", "__add__", "add_", "__iadd__"):
        func = getattr(torch.Tensor, name)
        assert operation(func) in {"add", "iadd"}
        assert is_in_place(func) == (name in {"add_", "__iadd__"})
    assert operation(torch.ops.aten.add) == operation(torch.ops.aten.add_.Tensor) == "add"
    assert is_in_place(torch.ops.aten.add_.Tensor)
    assert operation(torch.Tensor.shape.__get__) == "shape"  # pyright: ignore[reportAttributeAccessIssue]
