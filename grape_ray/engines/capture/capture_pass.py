"""One pass over one micro-batch: what is done with each use of a parameter, and with the gradient
that comes back from it.
"""

from __future__ import annotations

import contextlib
import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from grape_ray.engines.capture.dependence import Dependence, tensors_in
from grape_ray.engines.capture.row_layout import Layout
from grape_ray.engines.capture.torch_functions import Call, is_in_place, operation
from grape_ray.engines.capture.tracked import (
    Node,
    Tracked,
    graph_of,
    no_subclass,
    tracked_in,
    values_of,
)
from grape_ray.errors import UnsupportedLayer


class Phase(enum.Enum):
    """What a capture is doing: the loss's forward pass, a verification of it, or the backward pass
    whose gradients count.
    """

    FORWARD = "forward"
    VERIFY = "verify"
    BACKWARD = "backward"


# the number of a tap in its pass, the shape of a value or the shapes of arguments, the shape it
# meets
Way = tuple[int, tuple, tuple]


# the result of a call with tracked arguments (capture.dispatch)
Dispatch = Callable[["CapturePass", Call], Any]


class Reroute(Exception):
    """Shared values that carry the batch inside, or along dimensions to which they are expanded,
    where the other was tried.
    """

    def __init__(self, ways: set[Way]):
        super().__init__(ways)
        self.ways = ways


class Unsettled(Exception):
    """A gradient at a use through which none came when its kind of pass was verified, so that
    nothing is known of its rows.
    """


class Tap:
    """One use of a parameter by the batch: where backward brings gradients that belong to examples.

    Attributes:
        key: (parameters, operation, number of leading dimensions). lead: the leading dimensions of
            what is used.
        layout: whose row is whose, once it is known. evidence: what came for each group whose
            losses went backward alone. Of each group: sums (2, *lead) of the gradient and of its
            magnitudes over the features.
        readings: all layouts that the evidence allows, where it was gathered. settled: whether they
            are one.
        recorded: whether the forward pass has met this use.
        way: where a shared value meets the batch: its place in `CapturePass.inside`; None for all other
            uses.
    """

    __slots__ = ("evidence", "key", "layout", "lead", "readings", "recorded", "settled", "way")

    def __init__(self, key: tuple[str, str, int], lead: tuple[int, ...]):
        self.key, self.lead = key, lead
        self.layout: Layout | None = None
        self.evidence: list[Tensor] = []
        self.readings: list[Layout] = []
        self.settled, self.recorded = True, False
        self.way: Way | None = None


class CapturePass:
    """One pass over one micro-batch: routes every operation on a tracked value, and hands what
    backward finds to the sink.

    Attributes:
        rows: examples in the micro-batch. dummy: a scalar that needs a gradient, an
            input of every tap (capture.taps).
        sink: the method's collector (engines.sink.Sink). dependence: knows what comes from the
            batch.
        taps: all uses in the order of the forward pass. half: whether any was computed in half
            precision.
        inside: the places where what is shared meets the batch in another way than was taken first:
            a value that carries the batch inside (dispatch.own), or arguments of unknown origin
            that turned out to be constant.
    """

    def __init__(
        self,
        rows: int,
        sink: Any,
        device: torch.device,
        constants: set[int],
        inside: set[Way],
        dispatch: Dispatch,
    ):
        self._dispatch = dispatch
        self.rows, self.sink, self.device = rows, sink, device
        self.dummy = torch.zeros((), requires_grad=True, device=device)
        self.constants, self.inside = constants, inside
        self.dependence = Dependence(rows, constants, Tracked)
        self.phase, self.taps, self.half = Phase.FORWARD, list[Tap](), False
        self._pending: dict[int, tuple[Node, Tensor]] = {}
        self._depends: dict[tuple, bool | None] = {}
        self._leaks: list[str] = []
        self._unsure: Way | None = None
        self._announcing = True

    def restart(self, sink: Any) -> None:
        """Forgets the pass, which is then made again for `sink`."""
        self.sink, self.taps, self._depends = sink, [], {}
        self.dependence = Dependence(self.rows, self.constants, Tracked)
        self.phase, self._unsure = Phase.FORWARD, None

    @contextlib.contextmanager
    def apart(self, dependence: Dependence) -> Iterator[list[Tap]]:
        """Another forward pass beside the one that counts, of as many examples as `dependence`
        says: gives the list of its uses.
        """
        before = self.taps, self.dependence, self.rows
        self.taps, self.dependence, self.rows, self._announcing = (
            [],
            dependence,
            dependence.rows,
            False,
        )
        try:
            yield self.taps
        finally:
            self.taps, self.dependence, self.rows = before
            self._announcing = True

    def track(self, node: Node) -> Tracked:
        """The stand-in of a node; a gradient that reaches it past the taps is noticed by
        `check_leaks`.
        """
        with no_subclass():
            differentiable = node.graph.is_floating_point() or node.graph.is_complex()
            stand_in = torch.Tensor._make_subclass(Tracked, node.value, differentiable)
            if differentiable:
                stand_in.register_post_accumulate_grad_hook(
                    functools.partial(_leaked, self._leaks, node.label)
                )
        stand_in.node, stand_in.capture = node, self
        return stand_in

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """The result of an operation in which at least one argument is tracked."""
        call = Call(func, operation(func), args, kwargs)
        if is_in_place(func) and isinstance(args[0], Tracked):
            self._write(call)
        if not torch.is_grad_enabled():  # of no gradient in torch either
            with no_subclass():
                return func(*values_of(args), **values_of(kwargs))
        return self._dispatch(self, call)

    def _write(self, call: Call) -> None:
        """Before an operation writes into a shared value: from then on it is no parameter any more,
        and what is written must be shared.
        """
        if self.phase is Phase.FORWARD and torch.is_grad_enabled() and self.depends(call):
            raise UnsupportedLayer(
                f"a copy of parameter {call.args[0].node.label}, by `{call.name}`",
                "values of the batch written into it",
                "values that are computed, not written",
                "use torch.cat or torch.where",
            )
        call.args[0].node.root = None

    def depends(self, call: Call) -> bool:
        """Whether the batch has a part in the arguments of a call.

        Raises:
            UnsupportedLayer: it has, and its rows were picked across examples by their values.
        """
        name, tensors = call.name, list(tensors_in(call.args, call.kwargs))
        plain = [t for t in tensors if not isinstance(t, Tracked)]
        key = (
            name,
            tuple(t.node.label for t in tensors if isinstance(t, Tracked)),
            tuple(t.shape for t in plain),
        )
        # a recomputed block, on any thread: as it was the first time
        if self.phase is not Phase.FORWARD:
            answer = self._depends.get(key, True)
            if answer is None:
                raise UnsupportedLayer(
                    f"operation '{name}' inside activation checkpointing",
                    "once of the batch and once not",
                    "one of both",
                    "do not recompute it",
                )
            return answer
        origins = [t for t in plain if not self.dependence.constant(t)]
        answer = bool(origins)
        if origins and not any(self.dependence.certain(t) for t in origins):
            self._unsure = len(self.taps), key[2], ()
            answer = self._unsure not in self.inside
        self._depends[key] = answer if self._depends.get(key, answer) == answer else None
        by = (
            next((p for t in plain if (p := self.dependence.picked(t)) is not None), None)
            if answer
            else None
        )
        if by is not None:
            raise UnsupportedLayer(
                f"operation '{name}' on parameter {', '.join(key[1])}",
                f"rows that `{by}` picked across examples by their values",
                "rows that belong to examples by their place (of experts, the implementation that"
                " computes all rows in place)",
                "choose such an implementation (transformers:"
                " model.set_experts_implementation('batched_mm')), or freeze the parameter",
            )
        return answer

    def shared_argument(self, tensor: Tensor) -> bool:
        """Whether the batch has no part in one argument; in a recomputed block, whether it had none
        the first time.
        """
        if self.phase is Phase.FORWARD:
            answer = self.dependence.constant(tensor)
            self._depends["argument", tensor.shape, tensor.dtype] = answer
            return answer
        return bool(self._depends.get(("argument", tensor.shape, tensor.dtype), False))

    def tap(self, nodes: Sequence[Node | None], name: str, lead: Sequence[int]) -> Tap:
        """Announces a use of parameters by the batch, with the leading dimensions of the gradients
        that it will bring.
        """
        found = [node for node in nodes if node is not None]
        tap = Tap((", ".join(node.label for node in found), name, len(lead)), tuple(lead))
        if self.phase is Phase.FORWARD:
            for node in found if self._announcing else ():
                for leaf in node.leaves:
                    self.sink.announce(leaf)
            tap.recorded = True
            self.taps.append(tap)
            tap.way, self._unsure = self._unsure, None
        return tap

    def arriving(self, tap: Tap, grad: Tensor) -> bool:
        """Told by a tap of its output's gradient (*lead, *features); whether it counts, or was a
        question of whose it is.
        """
        if self.phase is Phase.FORWARD:
            raise UnsupportedLayer(
                f"a gradient of parameter {tap.key[0]} is taken inside the loss",
                "torch.autograd.grad or backward within the forward pass",
                "a loss without gradients of its own",
                "leave the gradient penalty out",
            )
        if self.phase is Phase.VERIFY:
            grad = torch.view_as_real(grad) if grad.is_complex() else grad
            features = list(range(len(tap.lead), grad.ndim))
            wide = grad if features else grad.unsqueeze(-1)
            features = features or [-1]
            sums = (
                wide.sum(features, dtype=torch.float64),
                wide.abs().sum(features, dtype=torch.float64),
            )
            tap.evidence.append(torch.stack(sums))
            return False
        if tap.layout is None:
            if not bool((grad != 0).any()):
                return False
            if tap.recorded:
                raise Unsettled
            raise UnsupportedLayer(
                f"operation '{tap.key[1]}' on parameter {tap.key[0]}",
                "a gradient that came from no use in the forward pass",
                "uses that the forward pass shows",
                "recompute with torch.utils.checkpoint(..., use_reentrant=False)",
            )
        return True

    def by_example(self, tap: Tap, tensor: Tensor) -> Tensor:
        """(*lead, *features) -> (B, T, *features)."""
        assert tap.layout is not None
        return tap.layout.by_example(tensor, len(tap.lead), self.rows)

    def summed(self, tap: Tap, tensor: Tensor) -> Tensor:
        """(*lead, *features) -> (B, *features), the sum over each example's positions."""
        assert tap.layout is not None
        return tap.layout.summed(tensor, len(tap.lead), self.rows)

    def derive(
        self, func: Callable, args: tuple, kwargs: dict, transposed: bool | None = None
    ) -> Any:
        """The operation on shared values alone; tensors in the result are tracked.

        Args:
            transposed: where the result is still the one parameter up to a cast: whether it is
                transposed now.
        """
        found = tracked_in(args, kwargs)
        with torch.enable_grad(), no_subclass():
            out = func(*tree_map(graph_of, args), **tree_map(graph_of, kwargs))
        leaves = {n: leaf for t in found for n, leaf in t.node.leaves.items()}
        root = found[0].node.root if transposed is not None else None
        return tree_map(
            lambda t: (
                self.track(Node(t, leaves, root, bool(transposed))) if isinstance(t, Tensor) else t
            ),
            out,
        )

    def dense(self, node: Node, grads: Tensor) -> None:
        """Takes per-example gradients (B, *node's shape); those of computed values wait for
        `flush`.
        """
        if node.root is not None and not node.transposed:
            self.sink.dense(node.root, grads)
        elif id(node) in self._pending:
            self._pending[id(node)] = (node, self._pending[id(node)][1] + grads)
        else:
            self._pending[id(node)] = (node, grads)

    @torch.no_grad()
    def flush(self) -> None:
        """Pulls the gradients of computed values back to their parameters, example by example
        (batched by vmap).
        """
        for node, grads in self._pending.values():
            if not node.graph.requires_grad:
                continue
            leaves = list(node.leaves.items())
            pulled = torch.autograd.grad(
                node.graph, [leaf for _, leaf in leaves], grads.to(node.graph.dtype),
                is_grads_batched=True, retain_graph=True, allow_unused=True,
            )  # fmt: skip
            for (name, _), grad in zip(leaves, pulled):
                if grad is not None:
                    self.sink.dense(name, grad)
        self._pending.clear()

    def check_leaks(self) -> None:
        """Raises UnsupportedLayer where backward brought a gradient past the taps: it would be
        lost.
        """
        if self._leaks:
            raise past_the_engine(self._leaks[0])


def _leaked(leaks: list[str], label: str, stand_in: Tensor) -> None:
    with no_subclass():
        stand_in.grad = None
    leaks.append(label)


def past_the_engine(label: str) -> UnsupportedLayer:
    """The refusal of a use that no tap sees."""
    return UnsupportedLayer(
        f"parameter {label} is used where torch functions are not seen",
        "a gradient of the whole batch (torch.jit, an autograd.Function of your own, vmap over it,"
        " a reference kept outside its module)",
        "uses as torch functions of what the module's own attribute holds",
        "freeze it (requires_grad=False), or write the operation with torch functions",
    )
