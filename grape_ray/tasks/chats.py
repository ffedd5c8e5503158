"""Chats as token ids, by a tokenizer's own template, and which of them the assistant said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from grape_ray.data.columns import Table
from grape_ray.errors import ConfigError

_ROLES = ("system", "user", "assistant", "tool")


def encoded(table: Table, column: str, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each chat, and for each token whether the assistant said it (1) or not (0).

    What the assistant said is found by writing the chat up to each of its turns, and up to that
    turn's end: a template that writes the beginning of a chat in another way once it goes on is
    refused.

    Raises:
        ConfigError: the tokenizer has no template. DataError: rows that are no chats, without a
            turn of the assistant, or that the template refuses.
    """
    chats = _chats(table, column, tokenizer)
    texts, spans, bad = [], [], []
    for row, messages in enumerate(chats):
        found = _written(tokenizer, messages)
        if found is None:
            bad.append(row)
            continue
        texts.append(found[0])
        spans.append(found[1])
    fix = "begin with the user, let roles take turns, and end with the assistant"
    table.refuse_rows("a chat that the template does not write", np.array(bad), "chats", fix)
    block = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    marks = [
        [int(any(a < end and b > start for start, end in own)) for a, b in offsets]
        for offsets, own in zip(block["offset_mapping"], spans)
    ]
    return block["input_ids"], marks


def prompts(table: Table, column: str, tokenizer: Any) -> list[list[int]]:
    """Token ids of each chat up to where the assistant would speak; its own last turn is left
    out.
    """
    texts = []
    for messages in _chats(table, column, tokenizer):
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        texts.append(_text(tokenizer, asked, add_generation_prompt=True))
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _chats(table: Table, column: str, tokenizer: Any) -> list[list[dict[str, str]]]:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "task.messages_column",
            "a tokenizer without a chat template",
            "one that has it",
            "use a chat model's tokenizer, or set tokenizer.chat_template and save it",
        )
    chats = table.lists(column, pa.types.is_struct, "messages with role and content")
    bad = [row for row, messages in enumerate(chats) if not all(map(_is_message, messages))]
    fix = f"each message is an object with role ({', '.join(_ROLES)}) and content, a text"
    table.refuse_rows("messages of another form", np.array(bad), "role and content", fix)
    return chats


def _is_message(message: dict[str, object]) -> bool:
    return message.get("role") in _ROLES and isinstance(message.get("content"), str)


def _written(
    tokenizer: Any, messages: list[dict[str, str]]
) -> tuple[str, list[tuple[int, int]]] | None:
    """A chat as text, and where the assistant's turns lie in it; None where that cannot be said."""
    try:
        text, spans = _text(tokenizer, messages), []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = _text(tokenizer, messages[:turn], add_generation_prompt=True)
            after = _text(tokenizer, messages[: turn + 1])
            if not (after.startswith(before) and text.startswith(after)):
                return None
            spans.append((len(before), len(after)))
    except Exception:  # the template's own refusal, whose text may quote the chat
        return None
    return (text, spans) if spans else None


def _text(tokenizer: Any, messages: list[dict[str, str]], **options: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)
