"""A task: questions about a passage, answered in words; learned as texts after a prompt, scored by
the F1 of words, as SQuAD and DROP are.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import dataclass

import numpy as np
from torch import nn

from grape_ray.data.arrays import Ragged, Records
from grape_ray.data.columns import Table
from grape_ray.data.prepared import Columns
from grape_ray.errors import ConfigError
from grape_ray.storage import Json
from grape_ray.tasks.text_generation import TextGeneration

_BETWEEN = "\x1e"  # of several answers; no text of a dataset holds it


@dataclass(frozen=True)
class Reading(TextGeneration):
    """The first answer is learned; the other fields are those of TextGeneration, of which `loss`,
    `max_tokens` and `max_new_tokens` are of use.

    Attributes:
        template: the prompt, with names of columns of texts in braces. Where prompt and answer have
            more than `max_tokens` tokens, the prompt loses its first ones.
        answers: the column of answers, texts, or lists of them; of a structure `column.member`.
        evaluate_answers: after the prompts of so many validation records an answer is generated,
            and compared with all that the record holds.
    """

    template: str = "{context}\nQuestion: {question}\nAnswer:"
    answers: str = "answers.text"
    evaluate_answers: int = 100
    name: str = "reading"

    def check_fields(self) -> None:
        super().check_fields()
        self.check_at_least(evaluate_answers=0)
        if not self._texts:
            expected = "names of columns of texts in braces"
            raise ConfigError("task.template", self.template, expected, "write some")

    @property
    def _texts(self) -> tuple[str, ...]:
        parts = string.Formatter().parse(self.template)
        return tuple(dict.fromkeys(name for _, name, _, _ in parts if name))

    @property
    def columns(self) -> Columns:
        return Columns((*self._texts, self.answers.partition(".")[0]), self._texts, self._texts)

    @property
    def input_columns(self) -> Columns:
        return Columns(self._texts, self._texts, self._texts)

    def encode(self, table: Table, facts: Json) -> Records:
        """Token ids, which of them are learned, and all answers as one text."""
        answers = self._answers(table)
        lost = np.array([row for row, found in enumerate(answers) if not found])
        table.refuse_rows("no answer", lost, "one or more", "leave those rows out")
        prompts = self.prompts(self._filled(table))
        # A space before it: the prompt ends in a colon, and words of decoders begin with one.
        whole, learned = self._cut(prompts, self._ids([f" {a[0]}" for a in answers], end=True))
        told = [_BETWEEN.join(found).encode() for found in answers]
        return Records(
            {
                "input_ids": Ragged.of(whole),
                "learned": Ragged.of(learned, np.uint8),
                "answers": Ragged.of_bytes(told),
            }
        )

    def inputs(self, table: Table) -> dict[str, Ragged]:
        prompts, most = self.prompts(self._filled(table)), self.max_tokens
        return {"input_ids": Ragged.of([_end_of(prompt, most, self.begin()) for prompt in prompts])}

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Loss and perplexity of the first answers, and the mean F1 of the answers that the model
        writes, the best over a record's.
        """
        found = super().evaluate(model, records)
        rows = range(min(self.evaluate_answers, len(records)))
        if not rows:
            return found
        ids, learned = records.sequences("input_ids"), records.sequences("learned")
        prompts = [ids[row][: int(learned[row].argmax())].tolist() for row in rows]
        told = records.sequences("answers")
        scores = [
            max(
                f1_of_words(text, answer) for answer in told[row].tobytes().decode().split(_BETWEEN)
            )
            for row, text in zip(rows, self.written(model, prompts))
        ]
        return {**found, "f1": float(np.mean(scores))}

    def _filled(self, table: Table) -> list[str]:
        columns = {name: table.texts(name) for name in self._texts}
        rows = zip(*columns.values())
        return [self.template.format(**dict(zip(columns, row))) for row in rows]

    def _answers(self, table: Table) -> list[list[str]]:
        """The answers of each row; none where the column holds no texts."""
        column, _, member = self.answers.partition(".")
        found = []
        for value in table.rows[column].to_pylist():
            value = value.get(member) if isinstance(value, dict) else value
            texts = value if isinstance(value, list) else [value]
            found.append([text for text in texts if isinstance(text, str) and text.strip()])
        return found

    def _cut(
        self, prompts: list[list[int]], answers: list[list[int]]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts with their answers, at most `max_tokens`, and which tokens are learned (1)."""
        most, begin = self.max_tokens, self.begin()
        answers = [answer[: most // 2] for answer in answers]
        pairs = [
            (_end_of(prompt, most - len(answer), begin), answer)
            for prompt, answer in zip(prompts, answers)
        ]
        whole = [[*prompt, *answer] for prompt, answer in pairs]
        return whole, [[0] * len(prompt) + [1] * len(answer) for prompt, answer in pairs]


def f1_of_words(text: str, answer: str) -> float:
    """The F1 of the words of a text against those of an answer, without case, punctuation and
    articles (Rajpurkar et al. 2016).

    >>> f1_of_words("The red  house.", "a red car")
    0.5
    """
    one, two = _words(text), _words(answer)
    common = (Counter(one) & Counter(two)).total()
    if not one or not two:
        return float(one == two)
    return 2 * common / (len(one) + len(two))


def _words(text: str) -> list[str]:
    plain = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _end_of(prompt: list[int], most: int, begin: list[int]) -> list[int]:
    """The end of a prompt, with the tokens that begin it."""
    if len(prompt) <= most:
        return prompt
    return [*begin, *prompt[len(prompt) - most + len(begin) :]]
