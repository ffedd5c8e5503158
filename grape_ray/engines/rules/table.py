"""The table of handlers, keyed by the function objects that torch hands to `__torch_function__`; a
user's functions are added to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.dependence import tensors_in
from grape_ray.engines.capture.dispatch import Handler, general, shared
from grape_ray.engines.capture.rule import Rule, rule_of_function
from grape_ray.engines.capture.tap_function import apply_rule
from grape_ray.engines.capture.torch_functions import Call, Result
from grape_ray.engines.capture.tracked import Tracked, tracked_in, values_of
from grape_ray.engines.rules import composite, convolutions, lookups, norms, products
from grape_ray.engines.rules.arguments import learned_elsewhere
from grape_ray.errors import UnsupportedLayer

HANDLERS: dict[Callable, Handler] = {
    F.linear: products.linear,
    torch.matmul: products.matmul,
    Tensor.matmul: products.matmul,
    Tensor.__matmul__: products.matmul,
    Tensor.__rmatmul__: products.matmul,
    torch.mm: products.matmul,
    Tensor.mm: products.matmul,
    torch.addmm: products.addmm,
    Tensor.addmm: products.addmm,
    torch.einsum: products.einsum,
    F.conv1d: convolutions.convolution,
    F.conv2d: convolutions.convolution,
    F.conv3d: convolutions.convolution,
    F.embedding: lookups.embedding,
    torch.embedding: lookups.plain_embedding,
    Tensor.__getitem__: lookups.getitem,
    F.layer_norm: norms.layer_norm,
    torch.layer_norm: norms.layer_norm,
    F.group_norm: norms.group_norm,
    torch.group_norm: norms.group_norm,
    F.batch_norm: norms.batch_norm,
    torch.batch_norm: norms.plain_batch_norm,
    F.rms_norm: norms.rms_norm,
    torch.rms_norm: norms.rms_norm,
    F.multi_head_attention_forward: composite.multi_head_attention,
    F.scaled_dot_product_attention: composite.scaled_dot_product_attention,
    torch.lstm: composite.recurrent,
    torch.gru: composite.recurrent,
    torch.rnn_tanh: composite.recurrent,
    torch.rnn_relu: composite.recurrent,
    torch.lstm_cell: composite.cell,
    torch.gru_cell: composite.cell,
    torch.rnn_tanh_cell: composite.cell,
    torch.rnn_relu_cell: composite.cell,
}


def register_rule(function: Callable, per_example_grad: Callable | Rule) -> None:
    """Teaches the engines a torch function (or an op of your own) that takes a trainable parameter.

    Args:
        function: the function as the model calls it, e.g. `torch.nn.functional.prelu`; it must go
            through `__torch_function__`, as every function of torch does.
        per_example_grad: `(grad_output, position, args, kwargs) -> Tensor (B, *param.shape)`, the
            gradient of each example's loss in the tensor args[position]; `args` are plain tensors,
            examples in the first dimension of the others. Or a `Rule`, whose settings are the
            keyword arguments.
    """
    known = isinstance(per_example_grad, Rule)
    rule = per_example_grad if known else rule_of_function(function, per_example_grad)
    HANDLERS[function] = functools.partial(_by_rule, rule)


def _by_rule(rule: Rule, capture: CapturePass, call: Call) -> Result:
    """The result of a call by a registered rule, the examples in the first dimension of args[0]."""
    if not capture.depends(call):
        return shared(capture, call)
    if by_keyword := tracked_in((), call.kwargs):
        raise UnsupportedLayer(
            f"operation '{call.name}' on parameter {by_keyword[0].node.label}",
            "a parameter given by keyword",
            "parameters given by position, as a registered rule counts them",
        )
    nested = tensors_in((call.kwargs, *(a for a in call.args if not isinstance(a, Tensor))), None)
    if learned_elsewhere(*nested):
        raise UnsupportedLayer(
            f"operation '{call.name}', of a registered rule",
            "an activation given by keyword or in a list, whose gradient would be lost",
            "activations as arguments by position",
        )
    first, *others = call.args
    # factors are those of an operation on a plain x, a weight and a bias
    if rule.factors is not None and (isinstance(first, Tracked) or tracked_in(call.args[3:], {})):
        return general(capture, call)
    # such a rule gives the gradient of its first argument, and of no other activation
    if rule.input_gradient is not None and learned_elsewhere(*others):
        return general(capture, call)
    lead = first.shape[:1] if rule.lead_of == "output" else (capture.examples,)
    return apply_rule(capture, rule, call.name, call.args, lead, values_of(call.kwargs))
