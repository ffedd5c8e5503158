"""Parameters that answer for themselves: a tensor subclass stands in for each trainable parameter during one pass.

The engine swaps it into the modules' own slots and takes it out again, so the model object stays the user's. Whatever the model
does with a parameter (a Linear, a bare `weight * x`, a tied head, `cls_token.expand(B, ...)`) reaches `Session.call`, on any
thread and inside recomputed checkpoints. A value is either *shared* (computed from parameters alone: it stays tracked, as a Node)
or *batched* (its first dimension is the batch: from there on it is a plain tensor whose gradient is per example).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_map

from grape_ray import sharding
from grape_ray.engines.layout import Layouts
from grape_ray.errors import UnsupportedLayer

_no_subclass = torch._C.DisableTorchFunctionSubclass


class Node:
    """A value computed from parameters alone, with its graph from leaf copies of them.

    Attributes:
        graph: the value, with autograd history. leaves: parameter name -> leaf.
        root: the parameter that it is, up to a cast, or None. transposed: whether it is that parameter's 2-D transpose.
    """

    __slots__ = ("graph", "leaves", "root", "transposed")

    def __init__(self, graph: Tensor, leaves: dict[str, Tensor], root: str | None = None, transposed: bool = False):
        self.graph, self.leaves, self.root, self.transposed = graph, leaves, root, transposed

    @property
    def value(self) -> Tensor:
        return self.graph.detach()

    @property
    def label(self) -> str:
        return "'" + "', '".join(self.leaves) + "'"


class Tracked(torch.Tensor):
    """The stand-in of a Node; lives for one pass."""

    node: Node
    session: Session

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = next(t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tracked))
        return first.session.call(func, args, kwargs)


class Session:
    """One pass over one micro-batch: routes every operation on a tracked value, and hands what backward finds to the sink.

    Attributes:
        rows: examples in the micro-batch. anchor: a scalar that ties every tap into the autograd graph.
        sink: the method's collector (engines.sink.Sink).
    """

    def __init__(self, rows: int, layouts: Layouts, sink: Any, device: torch.device):
        self.rows, self.layouts, self.sink = rows, layouts, sink
        self.anchor = torch.zeros((), requires_grad=True, device=device)
        self._pending: dict[int, tuple[Node, Tensor]] = {}

    def track(self, node: Node) -> Tracked:
        with _no_subclass():
            stand_in = torch.Tensor._make_subclass(Tracked, node.value)
        stand_in.node, stand_in.session = node, self
        return stand_in

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """The result of an operation in which at least one argument is tracked."""
        from grape_ray.engines.dispatch import find

        name = getattr(func, "__name__", str(func)).strip("_")
        if name == "get":
            name = getattr(func.__self__, "__name__", name)  # the attribute read: T, shape, dtype, ...
        return find(func, name)(self, func, name, args, kwargs)

    def batched(self, tracked: list[Tracked], name: str, shape: torch.Size | tuple[int, ...]) -> bool:
        """Whether an operation's tensor of `shape` carries the batch in its first dimension (Layouts.batched)."""
        label = ", ".join(t.node.label for t in tracked)
        return self.layouts.batched((label, name, str(len(shape))), tuple(shape), self.rows)

    def announce(self, *nodes: Node | None) -> None:
        """Tells the sink which parameters this operation will bring gradients of."""
        for node in nodes:
            for name in node.leaves if node is not None else ():
                self.sink.announce(name)

    def derive(self, func: Callable, args: tuple, kwargs: dict, transposed: bool | None = None) -> Any:
        """The operation on shared values alone; tensors in the result are tracked.

        Args:
            transposed: where the result is still the one parameter up to a cast: whether it is transposed now.
        """
        found = tracked_in(args, kwargs)
        with torch.enable_grad(), _no_subclass():
            out = func(*tree_map(_graph_of, args), **tree_map(_graph_of, kwargs))
        leaves = {n: leaf for t in found for n, leaf in t.node.leaves.items()}
        root = found[0].node.root if transposed is not None else None
        return tree_map(lambda t: self.track(Node(t, leaves, root, bool(transposed))) if isinstance(t, Tensor) else t, out)

    def dense(self, node: Node, grads: Tensor) -> None:
        """Takes per-example gradients (B, *node's shape); those of computed values wait for `flush`."""
        if node.root is not None and not node.transposed:
            self.sink.dense(node.root, grads)
        elif id(node) in self._pending:
            self._pending[id(node)] = (node, self._pending[id(node)][1] + grads)
        else:
            self._pending[id(node)] = (node, grads)

    def flush(self) -> None:
        """Pulls the gradients of computed values back to their parameters, example by example (batched by vmap)."""
        for node, grads in self._pending.values():
            leaves = list(node.leaves.items())
            pulled = torch.autograd.grad(
                node.graph, [leaf for _, leaf in leaves], grads.to(node.graph.dtype),
                is_grads_batched=True, retain_graph=True, allow_unused=True,
            )  # fmt: skip
            for (name, _), grad in zip(leaves, pulled):
                if grad is not None:
                    self.sink.dense(name, grad)
        self._pending.clear()


def tracked_in(args: tuple, kwargs: dict) -> list[Tracked]:
    """The tracked tensors among the arguments, in order."""
    return [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tracked)]


def values_of(tree: Any) -> Any:
    """The arguments with every tracked tensor replaced by its plain value."""
    return tree_map(lambda t: t.node.value if isinstance(t, Tracked) else t, tree)


def _graph_of(leaf: Any) -> Any:
    return leaf.node.graph if isinstance(leaf, Tracked) else leaf


class Slot(NamedTuple):
    """A place in a module where a parameter is held."""

    module: nn.Module
    key: str
    name: str
    param: nn.Parameter


def _stand_in(session: Session, slots: list[Slot]) -> None:
    """Puts a stand-in into every slot that holds a whole tensor; a tied one is the same everywhere."""
    made: dict[int, Tracked] = {}
    for slot in slots:
        value = slot.module._parameters[slot.key]
        if value is None or isinstance(value, (Tracked, DTensor)):
            continue
        if id(value) not in made:
            leaf = value.detach().requires_grad_()
            made[id(value)] = session.track(Node(leaf, {slot.name: leaf}, slot.name))
        slot.module._parameters[slot.key] = made[id(value)]  # pyright: ignore[reportArgumentType]


def _kept_buffers(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """The buffers that a checkpoint would hold, by name, with the number of times each was written to."""
    found = {}
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                found[f"{prefix}.{key}" if prefix else key] = (buffer, buffer._version)
    return found


def _check_buffers(before: dict[str, tuple[Tensor, int]], after: dict[str, tuple[Tensor, int]]) -> None:
    """Refuses a model that keeps running statistics: they are functions of the examples, without noise."""
    for name, (buffer, version) in after.items():
        if name not in before or before[name][0] is not buffer or before[name][1] != version:
            raise UnsupportedLayer(
                f"buffer '{name}' is written to in the forward pass",
                None,
                "buffers that training leaves alone",
                "call .eval() on its layer, or register the buffer with persistent=False",
            )


@contextlib.contextmanager
def tracking(model: nn.Module, params: dict[str, nn.Parameter], session: Session) -> Iterator[None]:
    """Swaps tracked stand-ins for `params` into the model's modules, and the parameters back afterwards, whatever happens.

    A sharded model's weights are there only while their block runs, so their stand-ins are made anew each time it is entered.

    Raises:
        UnsupportedLayer: a parameter received an ordinary gradient, so the model reached it past the engine; or a buffer was written to.
    """
    names = {id(param): name for name, param in params.items()}
    slots = [
        Slot(module, key, names[id(param)], param)
        for module in model.modules()
        for key, param in module._parameters.items()
        if param is not None and id(param) in names
    ]
    grads = {name: p.grad for name, p in params.items()}
    gated, buffers = dict(sharding.gates(model)), _kept_buffers(model)
    try:
        for param in params.values():
            param.grad = None
        owners = {part: gate for module, gate in gated.items() for part in module.modules()}  # inner blocks come later and win
        for gate in gated.values():
            gate.watcher = functools.partial(_stand_in, session, [s for s in slots if owners[s.module] is gate])
        if not gated:
            _stand_in(session, slots)
        yield
        leaked = [name for name, p in params.items() if p.grad is not None]
    finally:
        for gate in gated.values():
            gate.watcher = None
        sharding.close(model)
        for slot in slots:
            slot.module._parameters[slot.key] = slot.param
        for name, param in params.items():
            param.grad = grads[name]
    _check_buffers(buffers, _kept_buffers(model))
    if leaked:
        raise UnsupportedLayer(
            f"parameter '{leaked[0]}' is used past its module's own slot (as nn.LSTM does)",
            None,
            "layers that read their parameters as attributes",
            "freeze it (requires_grad=False) or replace the layer",
        )
