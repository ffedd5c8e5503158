"""A language model's head on some positions alone: a large vocabulary is not scored where nothing
is learned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def logits_at(model: nn.Module, places: Tensor, **inputs: Any) -> Tensor:
    """(B, K, V): what a model of transformers gives at K positions of each of B examples.

    Args:
        places: (B, K) positions. inputs: of the model, by name.
    """
    own: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    with _only(own.base_model, places):
        found = model(**inputs).logits
    # a model whose head reads its body past the hook has given all positions
    return found if found.shape[1] == places.shape[1] else _at(found, places)


@contextlib.contextmanager
def _only(body: nn.Module, places: Tensor) -> Iterator[None]:
    """The head that follows a model's body sees (B, K, D), not all positions."""

    def keep(_module: nn.Module, _args: object, output: Any) -> Any:
        output[next(iter(output))] = _at(output[0], places)
        return output

    hook = body.register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    """(B, K, D) of (B, T, D)."""
    return hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[-1]))
