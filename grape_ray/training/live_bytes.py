"""What a program over shapes would hold at once: the bytes of all tensors that live, by what made
them, when they are most.

The program runs as it is, on the meta device, where tensors have shapes and no memory; so its peak
is counted rather than estimated, for any method, and takes a second where the program would take
minutes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grape_ray.errors import ConfigError


def _answer(question: Tensor) -> bool:
    """What is read of a tensor without values: not all of a mask is set, and nothing is wrong.

    Raises:
        ConfigError: a number is read, which the program may turn on.
    """
    if question.dtype != torch.bool:
        raise ConfigError(
            "a model that reads numbers of its batch",
            "no numbers",
            "a step that is a function of shapes",
            "measure it: grape-ray check",
        )
    return False


class LiveBytes(TorchDispatchMode):
    """Counts storages from their making to their end, while it is entered.

    Attributes:
        kind: of what is made now. peaks: of each kind, while it was set, the most bytes that lived
            at once, by the kind that they are of.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[int, str, Any]] = {}
        self._now: Counter[str] = Counter()
        self._total = 0
        self._most: Counter[str] = Counter()
        self.peaks: dict[str, dict[str, int]] = {}
        self.kind = "other"

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """What is made in this block is of a kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were there before."""
        for tensor in tensors:
            self._begin(tensor)

    def _begin(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._live:
            return
        size, kind = storage.nbytes(), self.kind

        def ended(_: object) -> None:
            del self._live[place]
            self._now[kind] -= size
            self._total -= size

        self._live[place] = size, kind, weakref.ref(storage, ended)
        self._now[kind] += size
        self._total += size
        if self._total > self._most[self.kind]:
            self._most[self.kind] = self._total
            self.peaks[self.kind] = dict(self._now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        shapes_alone = bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        if func is torch.ops.aten.nonzero.default and shapes_alone:
            # of flags that say what is wrong: nothing is
            out = args[0].new_empty((0, args[0].ndim), dtype=torch.int64)
        elif func is torch.ops.aten._local_scalar_dense.default and shapes_alone:
            return _answer(args[0])
        else:
            out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._begin(leaf)
        return out
