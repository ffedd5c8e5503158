"""The one table of tasks: a name for run files and `grape-ray init`, and where its class lives."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from grape_ray.config.modules import load_module, located
from grape_ray.errors import ConfigError, nearest


@dataclass(frozen=True)
class TaskKind:
    """One task that comes with the package.

    Attributes:
        home: `module:Class` below `grape_ray.tasks`. title: one line for tables.
    """

    home: str
    title: str


KINDS: dict[str, TaskKind] = {
    "text-classification": TaskKind(
        "text_classification:TextClassification", "texts, or pairs of texts, and labels"
    ),
    "prompt-classification": TaskKind(
        "prompt_classification:PromptClassification", "texts in a template, label words scored"
    ),
    "regression": TaskKind("regression:Regression", "texts, or pairs of texts, and numbers"),
    "token-classification": TaskKind(
        "token_classification:TokenClassification", "words and a tag for each"
    ),
    "text-generation": TaskKind(
        "text_generation:TextGeneration", "texts, prompts and answers, or chats, for a decoder"
    ),
    "seq2seq": TaskKind("seq2seq:Seq2Seq", "texts to texts, for an encoder with a decoder"),
    "preference": TaskKind(
        "preference:Preference", "a prompt, the answer that was chosen and the one rejected (DPO)"
    ),
    "image-classification": TaskKind(
        "image_classification:ImageClassification", "images and labels"
    ),
}


def task_class(kind: str) -> type:
    """The class of a task: one of `KINDS`, or `module:Class` of the user's own.

    Raises:
        ConfigError: there is none of that name.
    """
    if kind in KINDS:
        module, _, name = KINDS[kind].home.partition(":")
        return getattr(importlib.import_module(f"grape_ray.tasks.{module}"), name)
    module, _, name = kind.partition(":")
    if not name:
        expected = "a task of this package, or module:Class of your own"
        raise ConfigError("task.kind", kind, expected, nearest(kind, KINDS))
    found = getattr(load_module(located(module, "task"), kind, "task"), name, None)
    if not isinstance(found, type):
        raise ConfigError("task.kind", kind, "a class of that module", "correct its name")
    return found
