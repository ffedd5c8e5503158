"""What is known of one operation on parameters: how it is computed, and each example's gradient.

The ancestor is PyTorch's own `torch.nn.utils._expanded_weights` (`ExpandedWeight`, `ExpandedLinear`
and so on): a tensor subclass in the place of a parameter, and a table from function objects to what
computes per-example gradients. There each operation is an autograd Function, the examples lie in
dimension 0, and every example's gradient is formed. Here one Function (`capture.tap_function`)
serves all rules, the examples lie where verification finds them, and a weight's gradient may stay a
pair of factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grape_ray.engines.algebra.factor_pairs import Left

Settings = dict[str, Any]
# what backward needs of forward: tensors, and whatever else was among the arguments
Saved = tuple[Any, ...]


@dataclass(frozen=True)
class Rule:
    """One operation as pure functions of plain tensors; who owns which rows is not their concern.

    Shapes: *lead, the leading dimensions along which the examples lie; O and I, the outputs and
    inputs of a weight seen as a matrix; R, the rank of a projection. `settings` are the arguments
    of the operation that are no tensors.

    Attributes:
        forward: (args, settings) -> (output, saved).
        gradient: (grad, position, saved, settings) -> (*lead, *shape), the gradient of the
            parameter args[position] in each row, where grad is the output's. Rows of one example
            are added up afterwards.
        factors: (grad, x, settings) -> (*lead, *positions, O) and (*lead, *positions, I), instead
            of `gradient` for an operation on (x, weight, bias): the weight's gradient is the sum
            over positions of their products, the bias's that of the first. x is None where its
            projection was kept in its place.
        project: (x, matrix (I, R), settings) -> (*lead, *positions, R), what `factors` makes of x
            times the matrix; None: x is kept whole.
        input_gradient: (grad, saved, settings) -> the gradient of args[0]; None: by torch, from
            `forward` computed again, whose `saved` are then its args.
        outputs_first: whether the weight is (O, I), as nn.Linear's, and not (I, O).
        lead_of: whether the leading dimensions of the `output` or those of the `gradient` carry the
            examples.
        per_row: whether a parameter's own rows belong to examples, so that each row's gradient is
            its owner's, and nothing is added up.
        casts: whether autocast lowers the precision of the arguments, as of a matrix product.
    """

    forward: Callable[[tuple, Settings], tuple[Tensor, Saved]]
    gradient: Callable[[Tensor, int, Saved, Settings], Tensor] | None = None
    factors: Callable[[Tensor, Tensor | None, Settings], tuple[Tensor, Left | None]] | None = None
    project: Callable[[Tensor, Tensor, Settings], Tensor] | None = None
    input_gradient: Callable[[Tensor, Saved, Settings], Tensor] | None = None
    outputs_first: bool = True
    lead_of: str = "output"
    per_row: bool = False
    casts: bool = False


def rule_of_function(function: Callable, per_example_grad: Callable) -> Rule:
    """The rule of a function of which only its parameters' per-example gradients are known; see
    `grape_ray.register_rule`.
    """
    return Rule(
        forward=lambda args, settings: (function(*args, **settings), args),
        gradient=per_example_grad,
        lead_of="gradient",
    )
