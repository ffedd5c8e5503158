"""Matrix products with a weight: linear layers, `matmul`, GPT-2's Conv1D, `einsum`."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.dispatch import general
from grape_ray.engines.capture.rule import Rule, Saved, Settings
from grape_ray.engines.capture.tap_function import apply_rule
from grape_ray.engines.capture.torch_functions import Call, Result
from grape_ray.engines.capture.tracked import Tracked
from grape_ray.engines.rules.arguments import bind, learned_elsewhere


def _linear(args: tuple, settings: Settings) -> tuple[Tensor, Saved]:
    """x W^T + b, of a weight (O, I)."""
    x, weight, bias = args
    return _owned(F.linear(x, weight, bias)), (weight,)


def _product(args: tuple, settings: Settings) -> tuple[Tensor, Saved]:
    """x W + b, of a weight (I, O)."""
    x, weight, bias = args
    return _owned(F.linear(x, weight.T, bias)), (weight,)


def _owned(out: Tensor) -> Tensor:
    # torch lets nobody write into a view that an autograd Function returns
    return out.clone() if out._is_view() else out


# x W^T + b of x (*lead, I)
LINEAR = Rule(
    forward=_linear,
    factors=lambda grad, x, settings: (grad, x),
    project=lambda x, matrix, settings: x @ matrix,
    input_gradient=lambda grad, saved, settings: grad @ saved[0],
    casts=True,
)
# x W + b
PRODUCT = replace(
    LINEAR,
    forward=_product,
    input_gradient=lambda grad, saved, settings: grad @ saved[0].T,
    outputs_first=False,
)


def linear(capture: CapturePass, call: Call) -> Result:
    """F.linear."""
    x, weight, bias = bind(call, "input weight bias")
    if isinstance(x, Tracked) or weight.ndim != 2 or not capture.depends(call):
        return general(capture, call)
    if isinstance(bias, Tensor) and bias.ndim != 1:
        return call.func(x, weight) + bias
    late = None  # a bias that the rule cannot take, added afterwards
    if learned_elsewhere(weight, bias):
        if not isinstance(weight, Tracked):
            return call.func(x, weight) + bias
        # its gradient belongs to what computed it: autograd brings it there
        bias, late = None, bias
    out = apply_rule(capture, LINEAR, call.name, (x, weight, bias), x.shape[:-1])
    return out if late is None else out + late


def matmul(capture: CapturePass, call: Call) -> Result:
    """x @ weight."""
    x, weight = bind(call, "input mat2" if "mat2" in call.kwargs else "input other")
    if call.name == "rmatmul":
        x, weight = weight, x
    if isinstance(x, Tracked) or weight.ndim != 2 or x.ndim < 2 or not capture.depends(call):
        return general(capture, Call(torch.matmul, "matmul", (x, weight), {}))
    return apply_rule(capture, PRODUCT, call.name, (x, weight, None), x.shape[:-1])


def addmm(capture: CapturePass, call: Call) -> Result:
    """bias + x W, as GPT-2's Conv1D writes it."""
    bias, x, weight, beta, alpha = bind(call, "input mat1 mat2 beta alpha", beta=1, alpha=1)
    fits = (
        all(isinstance(value, Tensor) for value in (bias, x, weight))
        and bias.ndim == 1
        and beta == 1
        and alpha == 1
        and not learned_elsewhere(weight, bias)
    )
    if isinstance(x, Tracked) or not fits or not capture.depends(call):
        return general(capture, call)
    return apply_rule(capture, PRODUCT, call.name, (x, weight, bias), x.shape[:-1])


def einsum(capture: CapturePass, call: Call) -> Result:
    """A product with one parameter, each of whose indices is either summed or new: a matrix product
    over any leading dimensions.
    """
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    number = next((n for n, o in enumerate(operands) if isinstance(o, Tracked)), 0)
    plain = (
        len(operands) == 2
        and isinstance(equation, str)
        and not isinstance(operands[1 - number], Tracked)
    )
    indices = _matrix_product(equation, number) if plain else None
    if indices is None or not capture.depends(call):
        return general(capture, call)
    of_weight, of_x, summed, new, lead, out = indices
    x, weight = operands[1 - number], operands[number]
    sizes = dict(zip(of_weight, weight.shape)) | dict(zip(of_x, x.shape))
    if any(sizes[i] != weight.shape[of_weight.index(i)] for i in summed):  # one of them is 1
        return general(capture, call)
    x = x.permute([of_x.index(i) for i in (*lead, *summed)]).flatten(len(lead))
    weight = weight.permute([of_weight.index(i) for i in (*summed, *new)]).reshape(x.shape[-1], -1)
    y = (x @ weight).unflatten(-1, [sizes[i] for i in new] or [1])
    y = y if new else y.squeeze(-1)
    return y.permute([[*lead, *new].index(i) for i in out])


def _matrix_product(equation: str, number: int) -> tuple | None:
    """The indices of the weight, which is operand `number`, of x, those that are summed, new and
    leading ones, and those of the result; None where the equation is no matrix product.
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or len(terms) != 2:
        return None
    of_weight, of_x = terms[number], terms[1 - number]
    summed = [i for i in of_weight if i in of_x and i not in out]
    new = [i for i in of_weight if i not in of_x and i in out]
    lead = [i for i in of_x if i not in of_weight and i in out]
    each_once = all(len(set(term)) == len(term) for term in (*terms, out))
    complete = (len(summed) + len(new), len(summed) + len(lead)) == (len(of_weight), len(of_x))
    return (of_weight, of_x, summed, new, lead, out) if summed and each_once and complete else None
