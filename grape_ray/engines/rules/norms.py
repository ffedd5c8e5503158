"""Normalisation layers: of each example's own features, and of fixed statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.dispatch import general, shared
from grape_ray.engines.capture.rule import Rule, Saved, Settings
from grape_ray.engines.capture.tap_function import apply_rule
from grape_ray.engines.capture.torch_functions import Call, Result
from grape_ray.engines.capture.tracked import Tracked, tracked_in
from grape_ray.engines.precision import autocast_dtype
from grape_ray.engines.rules.arguments import bind, learned_elsewhere
from grape_ray.errors import UnsupportedLayer


def _forward(args: tuple, settings: Settings) -> tuple[Tensor, Saved]:
    """Layer normalisation of x (*lead, *shape) over the dimensions `shape`."""
    x, weight, bias = args
    y, mean, rstd = torch.native_layer_norm(x, settings["shape"], weight, bias, settings["eps"])
    return y, (x, mean, rstd, weight, bias)


def _gradient(grad: Tensor, position: int, saved: Saved, settings: Settings) -> Tensor:
    """(*lead, *shape), each row's gradient in the scale (position 1) or the shift (2)."""
    x, mean, rstd, *_ = saved
    return x.sub(mean).mul_(rstd).mul_(grad) if position == 1 else grad


def _input_gradient(grad: Tensor, saved: Saved, settings: Settings) -> Tensor:
    x, mean, rstd, weight, bias = saved
    return torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), x, settings["shape"], mean, rstd, weight, bias, [True, False, False]
    )[0]


LAYER_NORM = Rule(forward=_forward, gradient=_gradient, input_gradient=_input_gradient)


def layer_norm(capture: CapturePass, call: Call) -> Result:
    """Layer normalisation over the last dimensions."""
    x, shape, weight, bias, eps, _ = bind(
        call, "input normalized_shape weight bias eps cudnn_enable", eps=1e-5
    )
    if isinstance(x, Tracked) or learned_elsewhere(weight, bias) or not capture.depends(call):
        return general(capture, call)
    dtype = x.dtype
    # autocast takes a layer norm to fp32, but does not know the operator that the rule calls
    if autocast_dtype(x.device.type):
        x = x.float()
    settings = {"shape": tuple(shape), "eps": eps}
    lead = x.shape[: x.ndim - len(settings["shape"])]
    y = apply_rule(capture, LAYER_NORM, call.name, (x, weight, bias), lead, settings)
    return y.to(dtype) if dtype == x.dtype else y


def _per_channel(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y * weight + bias with one of each a channel (dimension 1), which is broadcast like any other
    shared value.
    """
    shape = (1, -1, *[1] * (y.ndim - 2))
    if weight is not None:
        y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def group_norm(capture: CapturePass, call: Call) -> Result:
    """Group normalisation."""
    x, groups, weight, bias, eps = bind(call, "input num_groups weight bias eps", eps=1e-5)
    if not capture.depends(call):
        return shared(capture, call)
    # scale and shift come afterwards, as products and sums whose gradients are known
    return _per_channel(F.group_norm(x, groups, None, None, eps), weight, bias)


def batch_norm(capture: CapturePass, call: Call) -> Result:
    """Batch normalisation by fixed statistics; that of the batch itself mixes examples."""
    x, mean, var, weight, bias, training, _, eps = bind(
        call, "input running_mean running_var weight bias training momentum eps", training=False,
        eps=1e-5
    )  # fmt: skip
    if training:
        label = ", ".join(t.node.label for t in tracked_in(call.args, call.kwargs))
        raise UnsupportedLayer(
            f"batch normalisation {label} in training mode",
            None,
            "no mixing of examples",
            "use GroupNorm or call .eval() on the layer",
        )
    if not capture.depends(call):
        return shared(capture, call)
    return _per_channel(F.batch_norm(x, mean, var, None, None, False, 0.0, eps), weight, bias)


def plain_batch_norm(capture: CapturePass, call: Call) -> Result:
    """torch.batch_norm, whose arguments come in another order than those of F.batch_norm."""
    x, weight, bias, mean, var, *rest = bind(
        call, "input weight bias running_mean running_var training momentum eps"
    )
    args = (x, mean, var, weight, bias, *rest)
    return batch_norm(capture, Call(F.batch_norm, call.name, args, {}))


def rms_norm(capture: CapturePass, call: Call) -> Result:
    """Root mean square normalisation."""
    x, shape, weight, eps = bind(call, "input normalized_shape weight eps")
    if isinstance(x, Tracked) or not capture.depends(call):
        return general(capture, call)
    return F.rms_norm(x, shape, None, eps) * weight
