"""What a repetition of a pass changes: other examples are exchanged, with what they draw at random;
or dropout is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from grape_ray.engines.capture.batches import Batch, is_mask, mapped
from grape_ray.engines.capture.dependence import Dependence
from grape_ray.engines.capture.draws import DRAWS, DROPOUT_AT, DROPOUTS, is_dropout
from grape_ray.engines.capture.torch_functions import operation


def exchanged(batch: Batch, others: Tensor, scale: float, masks: bool = False) -> Batch:
    """The batch with each of `others` (B,) replaced by one of the rest, real numbers `scale` times
    as large.

    Args:
        masks: whether tensors of zeros and ones are exchanged as well; models take other paths
            where nothing is masked.
    """
    # records that are there, not invented ones, on which a model might fail
    rest = (~others).nonzero().squeeze(1)
    source = torch.arange(len(others))
    source[others] = rest[torch.arange(int(others.sum())) % len(rest)]

    def exchange(leaf: Tensor) -> Tensor:
        if not masks and is_mask(leaf):
            return leaf
        out = leaf[source.to(leaf.device)]
        if leaf.is_floating_point() and scale != 1.0:
            out[others.to(leaf.device)] *= scale
        return out

    return mapped(batch, exchange)


class WithoutDropout(TorchFunctionMode):
    """A pass without dropout, in a model that is otherwise in training mode."""

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs, name = kwargs or {}, operation(func)
        if is_dropout(name, args, kwargs):
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention" and kwargs.get("dropout_p"):
            kwargs = {**kwargs, "dropout_p": 0.0}
        if name in DROPOUT_AT and len(args) > DROPOUT_AT[name]:
            args = (*args[: DROPOUT_AT[name]], 0.0, *args[DROPOUT_AT[name] + 1 :])
        return func(*args, **kwargs)


class ExchangedDraws(Dependence):
    """The dependence of a pass whose other examples were exchanged: what they draw at random is
    exchanged as well.

    Each draw takes as many random numbers as ever; then the rows of `others` are set to extreme
    values, and so is a draw that has no row for each example. An example whose draws are its own
    keeps its loss.

    Args:
        others: (B,) bool. high: whether extremes are high ones.
    """

    def __init__(
        self, examples: int, constants: set[int], tracked_class: type, others: Tensor, high: bool
    ):
        super().__init__(examples, constants, tracked_class)
        self._others, self._high = others, high

    def _draw(self, name: str, args: tuple, kwargs: dict | None, out: Sequence[Tensor]) -> None:
        super()._draw(name, args, kwargs, out)
        own_mask = name not in DRAWS and not self._all_constant(args, kwargs)
        for tensor in () if own_mask else out:
            self._exchange(name, tensor.detach())

    def _exchange(self, name: str, drawn: Tensor) -> None:
        if drawn.numel() == 0:
            return
        # where a dimension has the batch's size, its rows count as the examples'
        axis = next((d for d in range(drawn.ndim) if drawn.shape[d] == self.examples), 0)
        per_example = drawn.ndim > 0 and drawn.shape[axis] % self.examples == 0
        low_high = DRAWS.get(name)
        if name in DROPOUTS:
            extreme = drawn * 2 if self._high else torch.zeros_like(drawn)
        # within the range of such draws, which the model may rely on
        elif low_high is not None and drawn.dtype != torch.bool:
            extreme = torch.full_like(drawn, low_high[self._high])
        elif drawn.dtype == torch.bool:
            extreme = torch.full_like(drawn, self._high)
        elif drawn.numel() == 1:
            extreme = drawn + 1 if self._high else drawn - 1
        else:
            # no range is known: the same values in other places
            extreme = drawn.reshape(-1).roll(1 if self._high else -1).view_as(drawn)
        if per_example:
            others = self._others.to(drawn.device).repeat_interleave(
                drawn.shape[axis] // self.examples
            )
            extreme = torch.where(
                others.view([-1 if d == axis else 1 for d in range(drawn.ndim)]), extreme, drawn
            )
        drawn.copy_(extreme)
