"""What the tasks of decoders have in common: prompts and answers as token ids, the loss of each
token, and texts that are generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grape_ray.data.arrays import Records
from grape_ray.models.head_positions import logits_at
from grape_ray.models.hugging_face import (
    check_vocabulary,
    explaining_long_texts,
    load_language_model,
    tokens_of,
)
from grape_ray.tasks import token_losses
from grape_ray.tasks.dataset_task import TokenizedTask, tokenizer_of
from grape_ray.tasks.generation import generated

BYTES = "bytes"
PAD = 0  # of any tokenizer: no token before the padding sees it
_BEGIN, _END, _FIRST_BYTE = 1, 2, 3
_BYTE_TOKENS = _FIRST_BYTE + 256


@dataclass(frozen=True)
class DecoderTask(TokenizedTask):
    """The model is a decoder; the other fields are those of TokenizedTask.

    Attributes:
        tokenizer: hub name or folder; empty is the model's own; `bytes` reads UTF-8 (259 ids),
            which no data had to be seen for.
        max_tokens: longer examples are cut at the end, and lose no more than that: a prompt too
            long leaves no text and is refused.
        max_new_tokens: of a text that is generated.
    """

    tokenizer: str = ""
    max_tokens: int = 1024
    max_new_tokens: int = 128

    def check_fields(self) -> None:
        super().check_fields()
        self.check_at_least(max_tokens=2, max_new_tokens=1)

    def reader(self) -> str:
        return BYTES if self.tokenizer == BYTES else super().reader()

    def load_tokenizer(self) -> Any:
        """The tokenizer; None of bytes."""
        if self.tokenizer == BYTES:
            return None
        if self.tokenizer:
            return tokenizer_of(self.tokenizer, "task.tokenizer")
        return tokenizer_of(self.model)

    def build_model(self, seed: int) -> nn.Module:
        tokens = _BYTE_TOKENS if self.tokenizer == BYTES else tokens_of(self.load_tokenizer())
        model = load_language_model(self.model, seed, weights=self.weights)
        return self.prepared_model(check_vocabulary(model, tokens, self.model), seed)

    def predict(self, model: nn.Module, records: Records) -> dict[str, list]:
        """The text that the model writes after each prompt, by the most likely token each time."""
        ids = records.sequences("input_ids")
        return {"text": self.written(model, [ids[index].tolist() for index in range(len(ids))])}

    def written(self, model: nn.Module, prompts: list[list[int]]) -> list[str]:
        """The text that the model writes after each prompt."""
        end = _END if self.tokenizer == BYTES else self.load_tokenizer().eos_token_id
        return self.texts_of(generated(model, prompts, self.max_new_tokens, end))

    def texts_of(self, answers: list[list[int]]) -> list[str]:
        """Tokens as texts, without special ones."""
        if self.tokenizer != BYTES:
            return list(self.load_tokenizer().batch_decode(answers, skip_special_tokens=True))
        return [
            bytes(t - _FIRST_BYTE for t in ids if t >= _FIRST_BYTE).decode(errors="replace")
            for ids in answers
        ]

    def begin(self) -> list[int]:
        """The token that the tokenizer puts before a text, if it has one."""
        token = _BEGIN if self.tokenizer == BYTES else self.load_tokenizer().bos_token_id
        return [] if token is None else [token]

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """Token ids of prompts, with that token."""
        begin = self.begin()
        return [[*begin, *ids] for ids in self._ids(texts, end=False)]

    def answered(
        self, prompts: Sequence[list[int]], texts: list[str]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of prompts with the texts that follow them, cut to `max_tokens`, and which of
        them are learned (1): the texts' and the last one.
        """
        most, answers = self.max_tokens, self._ids(texts, end=True)
        return (
            [[*prompt, *answer][:most] for prompt, answer in zip(prompts, answers)],
            [
                [*[0] * len(prompt), *[1] * len(answer)][:most]
                for prompt, answer in zip(prompts, answers)
            ],
        )

    def _ids(self, texts: list[str], end: bool) -> list[list[int]]:
        """Token ids without special tokens, but for the last one if `end`."""
        if self.tokenizer == BYTES:
            return [
                [b + _FIRST_BYTE for b in text.encode()] + ([_END] if end else []) for text in texts
            ]
        tokenizer = self.load_tokenizer()
        found = tokenizer(
            texts, add_special_tokens=False, truncation=True, max_length=self.max_tokens
        )["input_ids"]
        last = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
        return [[*ids, *last] for ids in found]


def learned_tokens(ids: Tensor, learned: Tensor) -> dict[str, Tensor]:
    """`places` (..., K), after which a token is learned, and `targets` (..., K), that token, or
    `token_losses.IGNORE` beyond a row's own: K is the largest number that a row has.

    Part of collating, not of a loss: K depends on the whole batch.

    Args:
        ids: (..., T). learned: (..., T) bool.
    """
    wanted = learned[..., 1:].int()
    count = wanted.sum(-1, keepdim=True)
    places = wanted.argsort(dim=-1, descending=True, stable=True)[..., : max(1, int(count.max()))]
    beyond = torch.arange(places.shape[-1]) >= count
    targets = ids[..., 1:].gather(-1, places).masked_fill(beyond, token_losses.IGNORE)
    return {"places": places, "targets": targets}


def next_token_losses(
    model: nn.Module, ids: Tensor, places: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (B, K) of each learned token, 0 beyond an example's own, and which there are.

    Examples are padded at their end and attention is causal, so no real token sees padding and no
    mask is needed.

    Args:
        ids: (B, T). places, targets: (B, K), as `learned_tokens` gives them.
    """
    with explaining_long_texts(model, ids.shape[1]):
        logits = logits_at(model, places, input_ids=ids, use_cache=False)
    return token_losses.of_targets(logits.float(), targets)
