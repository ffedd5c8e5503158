"""One pass over one micro-batch: which operations the batch has a part in, and where the gradients
go that backward brings.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from grape_ray.engines.capture.dependence import Dependence, tensors_in
from grape_ray.engines.capture.tap import Phase, Site, Tap, UnverifiedUse, bypassed
from grape_ray.engines.capture.torch_functions import Call, Result, is_in_place, operation
from grape_ray.engines.capture.tracked import (
    Node,
    Tracked,
    graph_of,
    no_subclass,
    tracked_in,
    values_of,
)
from grape_ray.engines.collector import Collector
from grape_ray.errors import UnsupportedLayer

Dispatch = Callable[["CapturePass", Call], object]


class CapturePass:
    """One pass over one micro-batch: routes every operation on a tracked value, and hands what
    backward finds to the collector.

    Attributes:
        examples: their number B in the micro-batch. collector: the method's `Collector`.
        dependence: knows what comes from the batch.
        taps: all uses in the order of the forward pass. half: whether any was computed in half
            precision.
        inner_sites: see `RetryPass`.
        dummy: a scalar that needs a gradient, an input of every tap (capture.tap_function).

    Args:
        constants: ids of tensors that are constant from the start. dispatch: gives the result of a
            call with tracked arguments (capture.dispatch).
    """

    def __init__(
        self,
        examples: int,
        collector: Collector,
        device: torch.device,
        constants: set[int],
        inner_sites: set[Site],
        dispatch: Dispatch,
    ):
        self._dispatch = dispatch
        self.examples, self.collector, self.device = examples, collector, device
        self.dummy = torch.zeros((), requires_grad=True, device=device)
        self.constants, self.inner_sites = constants, inner_sites
        self.dependence = Dependence(examples, constants, Tracked)
        self.phase, self.taps, self.half = Phase.FORWARD, list[Tap](), False
        self._pending: dict[int, tuple[Node, Tensor]] = {}
        # answers of the forward pass: a recomputed block asks again on a thread of autograd's,
        # where no mode follows the tensors
        self._depends: dict[tuple, bool | None] = {}
        self._leaks: list[str] = []
        self._unsure: Site | None = None
        self._announcing = True

    def restart(self, collector: Collector) -> None:
        """Forgets the pass, which is then made again for `collector`."""
        self.collector, self.taps, self._depends = collector, [], {}
        self.dependence = Dependence(self.examples, self.constants, Tracked)
        self.phase, self._unsure = Phase.FORWARD, None

    @contextlib.contextmanager
    def separate_pass(self, dependence: Dependence) -> Iterator[list[Tap]]:
        """Another forward pass beside the one that counts, of as many examples as `dependence`
        says: gives the list of its uses.
        """
        before = self.taps, self.dependence, self.examples
        self.taps, self.dependence, self.examples = [], dependence, dependence.examples
        # collectors count announced uses, and a repetition brings them nothing
        self._announcing = False
        try:
            yield self.taps
        finally:
            self.taps, self.dependence, self.examples = before
            self._announcing = True

    def track(self, node: Node) -> Tracked:
        """A tracked tensor with the value of a node; a gradient that reaches it past the taps is
        noticed by `check_leaks`.
        """
        with no_subclass():
            differentiable = node.graph.is_floating_point() or node.graph.is_complex()
            # a gradient that arrives here came through no tap, and would be lost
            tracked = torch.Tensor._make_subclass(Tracked, node.value, differentiable)
            if differentiable:
                tracked.register_post_accumulate_grad_hook(
                    functools.partial(_leaked, self._leaks, node.label)
                )
        tracked.node, tracked.capture = node, self
        return tracked

    def call(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """The result of an operation in which at least one argument is tracked."""
        call = Call(func, operation(func), args, kwargs)
        if is_in_place(func) and args and isinstance(args[0], Tracked):
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
        tensors = list(tensors_in(call.args, call.kwargs))
        plain = [t for t in tensors if not isinstance(t, Tracked)]
        labels = tuple(t.node.label for t in tensors if isinstance(t, Tracked))
        key = call.name, labels, tuple(t.shape for t in plain)
        if self.phase is not Phase.FORWARD:
            return self._depended(key)
        origins = [t for t in plain if not self.dependence.constant(t)]
        answer = bool(origins)
        if origins and not any(self.dependence.certain(t) for t in origins):
            # of unknown origin, as from a cache: taken for the batch's, unless the gradients of an
            # earlier try have shown that they are not
            self._unsure = len(self.taps), key[2], ()
            answer = self._unsure not in self.inner_sites
        # None: calls that look alike had two answers
        self._depends[key] = answer if self._depends.get(key, answer) == answer else None
        by = next((p for t in plain if (p := self.dependence.picked(t)) is not None), None)
        if answer and by is not None:
            raise UnsupportedLayer(
                f"operation '{call.name}' on parameter {', '.join(labels)}",
                f"rows that `{by}` picked across examples by their values",
                "rows that belong to examples by their place (of experts, the implementation that"
                " computes all rows in place)",
                "choose such an implementation (transformers:"
                " model.set_experts_implementation('batched_mm')), or freeze the parameter",
            )
        return answer

    def _depended(self, key: tuple) -> bool:
        """What `depends` answered in the forward pass, for a block that is recomputed, on any
        thread.
        """
        answer = self._depends.get(key, True)
        if answer is None:
            raise UnsupportedLayer(
                f"operation '{key[0]}' inside activation checkpointing",
                "once of the batch and once not",
                "one of both",
                "do not recompute it",
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
                    self.collector.announce(leaf)
            tap.recorded = True
            self.taps.append(tap)
            tap.site, self._unsure = self._unsure, None
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
            tap.add_evidence(grad)
            return False
        if tap.layout is None:
            # zeros are nobody's, and need no layout
            if not bool((grad != 0).any()):
                return False
            if tap.recorded:
                raise UnverifiedUse
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
        return tap.layout.by_example(tensor, len(tap.lead), self.examples)

    def summed(self, tap: Tap, tensor: Tensor) -> Tensor:
        """(*lead, *features) -> (B, *features), the sum over each example's positions."""
        assert tap.layout is not None
        return tap.layout.summed(tensor, len(tap.lead), self.examples)

    def derive(
        self, func: Callable, args: tuple, kwargs: dict, transposed: bool | None = None
    ) -> Result:
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
            self.collector.dense(node.root, grads)
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
                # kept: ghost clipping comes through a second time
                is_grads_batched=True, retain_graph=True, allow_unused=True,
            )  # fmt: skip
            for (name, _), grad in zip(leaves, pulled):
                if grad is not None:
                    self.collector.dense(name, grad)
        self._pending.clear()

    def check_leaks(self) -> None:
        """Raises UnsupportedLayer where backward brought a gradient past the taps: it would be
        lost.
        """
        if self._leaks:
            raise bypassed(self._leaks[0])


def _leaked(leaks: list[str], label: str, tracked: Tensor) -> None:
    with no_subclass():
        tracked.grad = None
    leaks.append(label)
