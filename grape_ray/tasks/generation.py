"""Texts that a language model writes: greedy, so that they are a function of the model alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grape_ray.models.hugging_face import explaining_long_texts, positions_of
from grape_ray.tasks.task import evaluating

_ROWS = 16


def generated(
    model: nn.Module, prompts: list[list[int]], max_new_tokens: int, end: int | None
) -> list[list[int]]:
    """The tokens that a Hugging Face decoder writes after each prompt, or an encoder-decoder for
    each source, up to `end`, or so many, or as many as the model has positions for.

    Prompts of a batch are of one length, so none is padded: a model that looks at padding writes
    the same.
    """
    found: list[list[int]] = [[] for _ in prompts]
    positions = positions_of(model)
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    writer: Any = model
    with evaluating(model), torch.no_grad():
        while order:
            length = len(prompts[order[0]])
            some = [i for i in order[:_ROWS] if len(prompts[i]) == length]
            order = order[len(some) :]
            ids = torch.tensor([prompts[i] for i in some], device=device)
            # an encoder-decoder repeats no prompt, only the token that its answers begin with
            before = 1 if writer.config.is_encoder_decoder else length
            # the last token that is written is not read again
            room = max_new_tokens if positions is None else max(1, positions - before + 1)
            with explaining_long_texts(model, length):
                written = writer.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=min(max_new_tokens, room),
                    do_sample=False,
                    num_beams=1,
                    eos_token_id=end,
                    pad_token_id=0 if end is None else end,
                )[:, before:].tolist()
            for index, tokens in zip(some, written):
                found[index] = tokens[: tokens.index(end)] if end in tokens else tokens
    return found
