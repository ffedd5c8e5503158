"""Prompts: texts put into a template whose mask a label's word fills in."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grape_ray.errors import ConfigError

_MASK = "mask"


@dataclass(frozen=True)
class Template:
    """What is before the mask and after it, as texts and names of columns in turn.

    Attributes:
        before, after: pairs of a text and of a column's name that follows it, empty where none
            does.
    """

    before: tuple[tuple[str, str], ...]
    after: tuple[tuple[str, str], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns' names, each once."""
        return tuple(dict.fromkeys(name for _, name in (*self.before, *self.after) if name))

    def filled(self, texts: Mapping[str, str], mask: str) -> str:
        """The template with a row's texts, by column, and something in the mask's place."""

        def part(pieces: tuple[tuple[str, str], ...]) -> str:
            return "".join(text + (texts[name] if name else "") for text, name in pieces)

        return part(self.before) + mask + part(self.after)


def parsed(template: str) -> Template:
    """A template such as ``{premise}? {mask}, {hypothesis}``.

    Raises:
        ConfigError: it has no mask or several, no column, or braces that are no name.

    >>> parsed("{text} It was {mask}.").columns
    ('text',)
    """
    expected = "columns' names in braces, and {mask} once, as in '{text} It was {mask}.'"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError("task.template", template, expected, str(error)) from error
    pieces = [(text, name or "") for text, name, _, _ in parts]
    masks = [place for place, (_, name) in enumerate(pieces) if name == _MASK]
    columns = [name for _, name in pieces if name not in ("", _MASK)]
    plain = all(name != "" and not (spec or how) for _, name, spec, how in parts)
    if len(masks) != 1 or not columns or not plain:
        raise ConfigError("task.template", template, expected, "correct it")
    (mask,) = masks
    return Template((*pieces[:mask], (pieces[mask][0], "")), tuple(pieces[mask + 1 :]))


def word_tokens(
    tokenizer: Any, template: Template, words: Sequence[str], causal: bool
) -> list[int]:
    """The one token of each label's word in the mask's place.

    Raises:
        ConfigError: a word is of several tokens there, or of the same as another.
    """
    found = []
    for word in words:
        ids = _alone(tokenizer, template, word, causal)
        expected = "one token in the place of {mask}"
        if ids is None:
            raise ConfigError(
                "task.label_words", word, expected, "choose a more common word, as it is written"
            )
        if ids in found:
            raise ConfigError("task.label_words", word, "a token of its own", "choose another word")
        found.append(ids)
    return found


def prompt_ids(tokenizer: Any, texts: list[str], causal: bool) -> list[list[int]]:
    """Token ids of filled templates; for a causal model without the tokens that would end them, and
    without spaces at their ends, which belong to the word that follows.
    """
    if not causal:
        return tokenizer(texts)["input_ids"]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found = tokenizer([text.rstrip() for text in texts], add_special_tokens=False)["input_ids"]
    return [[*begin, *ids] for ids in found]


def _alone(tokenizer: Any, template: Template, word: str, causal: bool) -> int | None:
    """The token that a word is in the mask's place, where it is one."""
    texts = dict.fromkeys(template.columns, "a")
    mask = "" if causal else tokenizer.mask_token
    both = [template.filled(texts, word), template.filled(texts, mask)]
    ids, masked = prompt_ids(tokenizer, both, causal)
    if causal:
        return ids[-1] if ids[:-1] == masked and ids[-1] != tokenizer.unk_token_id else None
    place = masked.index(tokenizer.mask_token_id)
    same = len(ids) == len(masked) and [*ids[:place], *ids[place + 1 :]] == [
        *masked[:place],
        *masked[place + 1 :],
    ]
    return ids[place] if same and ids[place] != tokenizer.unk_token_id else None
