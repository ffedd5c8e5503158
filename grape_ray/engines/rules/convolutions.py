"""Convolutions (groups=1), seen as a matrix (O, C * kernel) over patches of their input."""

from __future__ import annotations

import torch
from torch import Tensor

from grape_ray.engines.algebra.patches import patches
from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.dispatch import general
from grape_ray.engines.capture.rule import Rule, Saved, Settings
from grape_ray.engines.capture.tap_function import apply_rule
from grape_ray.engines.capture.torch_functions import Call, Result
from grape_ray.engines.capture.tracked import Tracked
from grape_ray.engines.rules.arguments import bind, learned_elsewhere


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    stride, padding, dilation = settings["spec"]
    return torch.convolution(
        x, weight, bias, stride, padding, dilation, False, [0] * len(stride), 1
    )


def _forward(args: tuple, settings: Settings) -> tuple[Tensor, Saved]:
    x, weight, bias = args
    return _convolved(x, weight, bias, settings), (weight,)


def _positions(images: Tensor) -> Tensor:
    """(N, C, *places) -> (N, positions, C)."""
    return images.flatten(2).transpose(1, 2)


def _factors(grad: Tensor, x: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor | None]:
    inputs = None if x is None else patches(x, settings["filter"][1:], settings["spec"])
    return _positions(grad), inputs


def _project(x: Tensor, matrix: Tensor, settings: Settings) -> Tensor:
    """Patches times a matrix: a convolution with the matrix's columns as filters."""
    return _positions(_convolved(x, matrix.T.reshape(-1, *settings["filter"]), None, settings))


def _input_gradient(grad: Tensor, saved: Saved, settings: Settings) -> Tensor:
    stride, padding, dilation = settings["spec"]
    return torch.ops.aten.convolution_backward(
        # of the input backward needs the shape alone: its values serve the weight's gradient
        grad, grad.new_empty(settings["x_shape"]), saved[0], None, stride, padding, dilation, False,
        [0] * len(stride), 1, [True, False, False],
    )[0]  # fmt: skip


CONVOLUTION = Rule(
    forward=_forward, factors=_factors, project=_project, input_gradient=_input_gradient, casts=True
)


def convolution(capture: CapturePass, call: Call) -> Result:
    """conv1d and conv2d of groups=1; others go the general way."""
    x, weight, bias, stride, padding, dilation, groups = bind(
        call, "input weight bias stride padding dilation groups", stride=1, padding=0, dilation=1,
        groups=1
    )  # fmt: skip
    dims = weight.ndim - 2
    whole = not isinstance(weight, Tracked) or (
        weight.node.root is not None and not weight.node.transposed
    )
    fits = whole and not learned_elsewhere(weight, bias) and not isinstance(padding, str)
    fits = fits and groups == 1 and dims <= 2 and x.ndim == dims + 2
    if isinstance(x, Tracked) or not fits or not capture.depends(call):
        return general(capture, call)
    spec = tuple(
        [v] * dims if isinstance(v, int) else list(v) * (dims if len(v) == 1 else 1)
        for v in (stride, padding, dilation)
    )
    settings = {"spec": spec, "filter": tuple(weight.shape[1:]), "x_shape": x.shape}
    return apply_rule(capture, CONVOLUTION, call.name, (x, weight, bias), x.shape[:1], settings)
