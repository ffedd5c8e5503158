"""Operations that pick rows across examples by their values (sorting, masks, routing to experts):
what comes out no longer belongs to examples by its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Operations that put values at places of their first argument, whose shape they keep.
WRITES_INTO = {
    "setitem", "index_put", "index_add", "index_copy", "index_fill", "index_reduce", "scatter",
    "scatter_add", "scatter_reduce", "masked_scatter", "masked_fill", "copy", "select_scatter",
    "slice_scatter", "put",
}  # fmt: skip
# Those that always pick.
_SELECTIONS = {
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "pack_padded_sequence",
    "take",
}  # fmt: skip
# Those that pick along one dimension: its position among the arguments, and its default.
_ALONG: dict[str, tuple[int, int | None]] = {
    "index_select": (1, None), "gather": (1, None), "take_along_dim": (2, None), "sort": (1, -1),
    # msort has no such argument: nothing stands at position 9
    "argsort": (1, -1), "topk": (2, -1), "msort": (9, 0), "kthvalue": (2, -1),
}  # fmt: skip
_BY_INDEX = {"index_select": 2, "gather": 2, "take_along_dim": 1}  # and where the index stands
_WRITES_BY_INDEX = {
    "index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce", "index_reduce",
}  # fmt: skip
MAY_PICK = {"getitem", "repeat_interleave", "where", *_SELECTIONS, *_ALONG, *WRITES_INTO}

# of a tensor, whether the batch has no part in it; and the operation that picked its rows, if any
Constant = Callable[[Tensor], bool]
Picked = Callable[[Tensor], str | None]


def picks(
    name: str, args: tuple, kwargs: dict, examples: int, constant: Constant, picked: Picked
) -> bool:
    """Whether a call of an operation in `MAY_PICK` on a tensor of the batch mixes up whose rows are
    whose.
    """
    source = args[0]
    if name == "getitem":
        return _index_picks(source, args[1], examples, constant)
    if name in WRITES_INTO:
        return _writes_by_index(name, args, constant, picked)
    if name in _SELECTIONS:
        return True
    if name == "repeat_interleave":
        repeats = kwargs.get("repeats", args[1] if len(args) > 1 else None)
        return isinstance(repeats, Tensor) and not constant(repeats)
    if name == "where":
        # with a condition alone it is `nonzero`
        return len(args) == 1 and not kwargs
    position, default = _ALONG[name]
    dim = kwargs.get("dim", args[position] if len(args) > position else default)
    of_examples = isinstance(dim, int) and source.ndim > 0 and dim % source.ndim == 0
    if not of_examples or source.shape[0] % examples:
        return False
    if name in _BY_INDEX:
        index = kwargs.get("index", kwargs.get("indices", args[_BY_INDEX[name] :][:1]))
        return not constant(index[0] if isinstance(index, tuple) else index)
    return True  # sorts along the examples


def _writes_by_index(name: str, args: tuple, constant: Constant, picked: Picked) -> bool:
    """Whether rows of the batch, in their own order, are written to places that data say; picked
    rows may be put back so.
    """
    if name in ("setitem", "index_put"):
        places = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
        index, values = (places[0] if places else None), args[2]
    elif name in _WRITES_BY_INDEX and len(args) > 3:
        if not isinstance(args[1], int) or args[1] % args[0].ndim:
            return False
        index, values = args[2], args[3]
    else:
        return False
    if not isinstance(index, Tensor) or not isinstance(values, Tensor) or index.ndim == 0:
        return False
    if constant(index) or constant(values):
        return False
    return not picked(values) and values.ndim > 0


def _index_picks(source: Tensor, index: Any, examples: int, constant: Constant) -> bool:
    """Whether `source[index]` picks across examples; harmless if each example's picks are as many
    and stay in order.
    """
    places = index if isinstance(index, tuple) else (index,)
    first = places[0] if places else None
    if not isinstance(first, Tensor) or first.ndim == 0 or constant(first):
        return False
    if source.shape[0] != examples or not all(isinstance(p, (Tensor, slice)) for p in places):
        return True
    # a mask uses up as many dimensions as it has
    used = max(
        1, sum(p.ndim if isinstance(p, Tensor) and p.dtype == torch.bool else 1 for p in places)
    )
    # the examples' numbers, indexed like their rows, say whose each picked row is
    number = torch.arange(examples, device=source.device).view(-1, *[1] * (used - 1))
    owner = number.expand(source.shape[:used])[index].reshape(-1)
    if owner.numel() % examples:
        return True
    regular = torch.arange(examples, device=owner.device)
    return not torch.equal(owner, regular.repeat_interleave(owner.numel() // examples))
