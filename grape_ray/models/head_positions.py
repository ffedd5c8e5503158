"""A language model's head on some positions alone: a large vocabulary is not scored where nothing
is learned.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def logits_at(model: nn.Module, places: Tensor, **inputs: Any) -> Tensor:
    """(B, K, V): what a model of transformers gives at K positions of each of B examples.

    Args:
        places: (B, K) positions. inputs: of the model, by name.
    """
    whole: Any = model
    head, met = whole.get_output_embeddings(), list[bool]()

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        met.append(True)
        return (_at(args[0], places), *args[1:])

    hook = head.register_forward_pre_hook(keep)
    try:
        found = model(**inputs).logits
    finally:
        hook.remove()
    return found if met else _at(found, places)  # a head whose weight is used, and not itself


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    """(B, K, D) of (B, T, D)."""
    return hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[-1]))
