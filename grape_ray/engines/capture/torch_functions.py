"""Which operation of torch a function object is.

torch hands `__torch_function__` a different object for a function (`torch.add`), a method
(`Tensor.add`), an operator (`Tensor.__add__`), a method that writes in place (`Tensor.add_`), an
attribute (`Tensor.shape.__get__`) and an operator of `torch.ops`. They are identified by object,
never by name: a user's function named `add` is not torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._ops import OpOverload, OpOverloadPacket

Result = Any  # of an operation: a tensor, a number, or a nest of them


class Call(NamedTuple):
    """One call of a function that takes tensors.

    Attributes:
        name: the operation's, as `operation` gives it.
    """

    func: Callable[..., Any]
    name: str
    args: tuple
    kwargs: dict[str, Any]


_HOMES = (torch, F, torch.nn.init, torch.linalg, torch.special, torch.fft)


def _known() -> dict[Callable, str]:
    """Every function, method and attribute getter of torch -> its name."""
    objects = [value for home in _HOMES for value in vars(home).values()]
    for name in dir(torch.Tensor):
        value = getattr(torch.Tensor, name)
        objects.append(value.__get__ if hasattr(value, "__set__") else value)
    names: dict[Callable, str] = {}
    for value in objects:
        if isinstance(value, type) or not callable(value):
            continue
        of_getter = getattr(value, "__name__", None) == "__get__"
        name = getattr(value.__self__ if of_getter else value, "__name__", None)
        if isinstance(name, str):
            # functions with one implementation are equal: torch.mm, torch.dsmm and torch.spmm; the
            # shortest name is the usual one
            names[value] = min(name, names.get(value, name), key=len)
    return names


_NAMES = _known()
_OPERATIONS = {
    func: name if func.__name__ == "__get__" else name.strip("_") for func, name in _NAMES.items()
}


def _writes(name: str) -> bool:
    """Whether torch gives such a name to what writes into its first argument."""
    if name[:2] == "__":  # operators: __iadd__, __imul__ and so on
        return name == "__setitem__" or (
            name[2] == "i" and name not in ("__invert__", "__int__", "__index__")
        )
    return name[-1:] == "_"


_IN_PLACE = frozenset(func for func, name in _NAMES.items() if _writes(name))


def public(func: Callable) -> Callable:
    """torch's public function for an operator of `torch.ops.aten`; any other as it is."""
    packet = func.overloadpacket if isinstance(func, OpOverload) else func
    if not isinstance(packet, OpOverloadPacket):
        return func
    namespace, name = packet._qualified_op_name.split("::")
    homes = (torch, torch.Tensor, F) if namespace == "aten" else ()
    return next((getattr(home, name) for home in homes if hasattr(home, name)), packet)


def operation(func: Callable) -> str:
    """The name of torch's operation, without the underscores of operators and in-place methods; of
    any other function its dotted name, which none of torch's has.
    """
    found = _OPERATIONS.get(func)
    if found is None:
        func = public(func)
        found = _OPERATIONS.get(func)
    if found is None:
        name = getattr(func, "__qualname__", None) or getattr(func, "__name__", str(func))
        return f"{getattr(func, '__module__', None) or 'unknown'}.{name}"
    return found


def is_in_place(func: Callable) -> bool:
    """Whether a function writes into its first argument; of functions that are not torch's, those
    whose names end like torch's.
    """
    if func in _OPERATIONS:
        return func in _IN_PLACE
    func = public(func)
    return func in _IN_PLACE or _writes(getattr(func, "__name__", ""))
