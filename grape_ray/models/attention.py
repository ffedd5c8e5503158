"""Which attention kernel a model runs with."""

from __future__ import annotations

from typing import Any

from torch import nn

# Beyond it, plain attention's scores of T x T take more memory than they save time.
_LONGEST = 512


def plain_attention_on_cpu(model: nn.Module, max_tokens: int) -> None:
    """Lets a Hugging Face model on a CPU attend by plain products of matrices, in place.

    For bf16 on a CPU: there PyTorch's fused kernel takes up to twice the time of plain products in
    the backward pass (measured with 14 to 384 tokens). A model that cannot choose, or was not going
    to use the fused kernel, stays as it is.

    Args:
        max_tokens: of the longest sequence; beyond 512 the fused kernel stays. 0: not a sequence.
    """
    config: Any = getattr(model, "config", None)
    choose: Any = getattr(model, "set_attn_implementation", None)
    fused = getattr(config, "_attn_implementation", None) == "sdpa"
    if choose is not None and fused and max_tokens <= _LONGEST:
        choose("eager")
