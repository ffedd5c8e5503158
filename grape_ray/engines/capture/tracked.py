"""Tracked parameters: a tensor subclass that takes the place of each trainable parameter during one
pass and sees every operation on it.

Whatever the model does with a parameter (a Linear, a bare `weight * x`, a tied head,
`cls_token.expand(B, ...)`) reaches `CapturePass.call`, on any thread and inside recomputed
checkpoints. A value is either *shared*, computed from parameters and constants alone: then it stays
tracked, as a Node. Or the batch has a part in it: from there on it is a plain tensor, whose
gradient is split by example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

# in this context tracked tensors are plain ones: what the engine itself does is not seen
no_subclass = torch._C.DisableTorchFunctionSubclass
_Tree = TypeVar("_Tree")  # any nest of dicts, lists and tuples


class Node:
    """A value computed from parameters alone, with its graph from leaf copies of them.

    Attributes:
        graph: the value, with autograd history. leaves: parameter name -> leaf.
        root: the parameter that it is, up to a cast, or None. transposed: whether it is that
            parameter's 2-D transpose.
        copies: where this value is copies of another, as of a prefix token.
        look_up: where this value is rows of a table at constant ids, as of positions: looks them up
            again in a pass, now as rows that belong to examples.
    """

    __slots__ = ("copies", "graph", "leaves", "look_up", "root", "transposed")

    def __init__(
        self,
        graph: Tensor,
        leaves: dict[str, Tensor],
        root: str | None = None,
        transposed: bool = False,
    ):
        self.graph, self.leaves, self.root, self.transposed = graph, leaves, root, transposed
        self.copies: Copies | None = None
        self.look_up: Callable[[Any], Tensor] | None = None

    @property
    def value(self) -> Tensor:
        """The value without history: a tap alone brings its gradients."""
        return self.graph.detach()

    @property
    def label(self) -> str:
        """The parameters' names, for errors."""
        return "'" + "', '".join(self.leaves) + "'"


class Copies(NamedTuple):
    """Copies of a shared value: `source` expanded to `shape`, and then reshaped by the operations
    `then`, (function, arguments) each.
    """

    source: Node
    shape: tuple[int, ...]
    then: tuple[tuple[Callable, tuple, dict], ...]

    def followed_by(self, func: Callable, args: tuple, kwargs: dict) -> Copies:
        """The same copies, reshaped once more."""
        return self._replace(then=(*self.then, (func, args, kwargs)))


class Router(Protocol):
    """What a tracked value asks for the result of an operation on it: a `CapturePass`."""

    def call(self, func: Callable, args: tuple, kwargs: dict) -> object: ...


class Tracked(torch.Tensor):
    """The value of a Node, in the place of the parameter; lives for one pass."""

    node: Node
    capture: Router

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # any of them knows the pass: tracked tensors live for one alone
        first = next(t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tracked))
        return first.capture.call(func, args, kwargs)


def tracked_in(args: tuple, kwargs: dict) -> list[Tracked]:
    """The tracked tensors among the arguments, in order."""
    return [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tracked)]


def values_of(tree: _Tree) -> _Tree:
    """The arguments with every tracked tensor replaced by its plain value."""
    return tree_map(lambda t: t.node.value if isinstance(t, Tracked) else t, tree)


def graph_of(leaf: object) -> object:
    """A tracked tensor's value with its autograd history; anything else as it is."""
    return leaf.node.graph if isinstance(leaf, Tracked) else leaf
