"""A task: classify texts by prompts (Gao et al. 2021, LM-BFF): a language model fills in a mask,
and each label is scored by a word of its own, so that no head is learned from nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from grape_ray.data.arrays import Ragged, Records
from grape_ray.data.columns import Table
from grape_ray.data.prepared import Columns
from grape_ray.errors import ConfigError, DataError
from grape_ray.models.head_positions import logits_at
from grape_ray.models.hugging_face import (
    check_vocabulary,
    explaining_long_texts,
    load_config,
    load_language_model,
    tokens_of,
)
from grape_ray.storage import Json
from grape_ray.tasks.dataset_task import TokenizedTask, tokenizer_of
from grape_ray.tasks.labels import LabelledTask
from grape_ray.tasks.prompts import parsed, prompt_ids, word_tokens
from grape_ray.tasks.task import Data


@dataclass(frozen=True)
class PromptClassification(LabelledTask, TokenizedTask):
    """The model is a masked language model, which keeps its pretrained head, or a causal one, which
    says what follows the prompt: the template ends in `{mask}` then. Which of the two it is says
    its configuration. The other fields are those of LabelledTask and TokenizedTask.

    Attributes:
        template: a text with the names of columns of texts in braces, and `{mask}` once, such as
            `{premise}? {mask}, {hypothesis}`.
        label_words: a word for each label, in the order of `labels`, or of the labels' numbers:
            each is one token in the mask's place.
        max_tokens: of a whole prompt; of longer ones the longest texts are cut, not the template.
        dropout: whether the model's dropout is on in training.
    """

    template: str = "{text} It was {mask}."
    label_words: tuple[str, ...] = ("terrible", "great")
    dropout: bool = False
    name: str = "prompt-classification"

    def check_fields(self) -> None:
        super().check_fields()
        parsed(self.template)
        if self.multi_label:
            fix = "unset it, or use text classification"
            raise ConfigError("task.multi_label", True, "false: a mask takes one word", fix)
        if len(self.label_words) < 2:
            got = list(self.label_words)
            raise ConfigError("task.label_words", got, "a word for each label", "name them")

    def check_together(self) -> None:
        super().check_together()
        labels = self.declared_labels()
        if labels and len(labels) != len(self.label_words):
            got, fix = len(self.label_words), "correct one of them"
            raise ConfigError("task.label_words", got, f"one for each of {len(labels)} labels", fix)
        if self.causal() and parsed(self.template).after != ():
            fix = "let task.template end in {mask}, or use a masked language model"
            what = "task.template for a causal language model"
            raise ConfigError(what, self.template, "nothing after {mask}", fix)

    @property
    def columns(self) -> Columns:
        texts = parsed(self.template).columns
        named = (*texts, self.label_column)
        return Columns(named, texts, named, self.unlabelled)

    @property
    def input_columns(self) -> Columns:
        """The columns that `predict` reads."""
        texts = parsed(self.template).columns
        return Columns(texts, texts, texts)

    def causal(self) -> bool:
        """Whether the model is a causal one: its configuration says so, or knows no mask."""
        return _is_causal(self.model)

    def facts(self, train: Table, names: Callable[[str], Sequence[str]]) -> Json:
        """The labels in the words' order: as named by a field or by the dataset, or numbers."""
        found = self.declared_labels() or names(self.label_column)
        if not found and train.holds_integers(self.label_column):
            found = tuple(str(label) for label in range(len(self.label_words)))
        if len(found) != len(self.label_words):
            what = f"column '{self.label_column}' of {train.place}"
            got = f"{len(found)} labels" if found else "labels that are no numbers"
            expected = f"a label for each of {len(self.label_words)} words"
            fix = "name the labels in task.labels, in the order of task.label_words"
            raise DataError(what, got, expected, fix)
        return {"labels": list(found)}

    def resolved(self, data: Data) -> PromptClassification:
        """With the labels' names, of which the words say no less."""
        return dataclasses.replace(self, labels=tuple(data.facts["labels"]), classes=0)

    def encode(self, table: Table, facts: Json) -> Records:
        return Records({**self.inputs(table), **self.targets(table, facts)})

    def inputs(self, table: Table) -> dict[str, np.ndarray | Ragged]:
        """Token ids of the prompts, and where in each the word is looked for."""
        causal, template, tokenizer = self.causal(), parsed(self.template), self._masking()
        columns = {name: table.texts(name) for name in template.columns}
        if not causal:  # whoever writes the mask himself does not say where the word is
            mask = tokenizer.mask_token
            columns = {n: [text.replace(mask, " ") for text in t] for n, t in columns.items()}
        rows = [dict(zip(columns, texts)) for texts in zip(*columns.values())]
        mask = "" if causal else tokenizer.mask_token
        prompts = prompt_ids(tokenizer, [template.filled(row, mask) for row in rows], causal)
        long = []
        for row, ids in enumerate(prompts):
            if len(ids) > self.max_tokens:
                prompts[row] = self._cut(rows[row], len(ids) - self.max_tokens)
                if not prompts[row]:
                    long.append(row)
        expected = f"a template of fewer than task.max_tokens = {self.max_tokens} tokens"
        fix = "raise task.max_tokens, or shorten the template"
        table.refuse_rows("no room for a text", np.array(long), expected, fix)
        places = [len(ids) - 1 if causal else ids.index(tokenizer.mask_token_id) for ids in prompts]
        return {"input_ids": Ragged.of(prompts), "place": np.array(places, dtype=np.int64)}

    def build_model(self, seed: int) -> nn.Module:
        self.word_ids()
        kind = "CausalLM" if self.causal() else "MaskedLM"
        model = load_language_model(self.model, seed, kind, self.weights).train(self.dropout)
        check_vocabulary(model, tokens_of(self.load_tokenizer()), self.model)
        return self.prepared_model(model, seed)

    def word_ids(self) -> list[int]:
        """The token of each label's word. Raises ConfigError where one has several."""
        self._masking()
        return _word_ids(self.model, self.template, self.label_words)

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        ids, mask = records.sequences("input_ids").padded(indices, self.pad_token())
        places = torch.from_numpy(records.array("place")[indices])
        batch = {"input_ids": ids, "attention_mask": mask, "place": places}
        if "labels" in records.columns:
            batch["labels"] = torch.from_numpy(records.array("labels")[indices])
        return batch

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, L): what the model gives for each label's word in the mask's place."""
        ids, mask, place = batch["input_ids"], batch["attention_mask"], batch["place"]
        with explaining_long_texts(model, ids.shape[1]):
            found = logits_at(model, place[:, None], input_ids=ids, attention_mask=mask)
        return found[:, 0, self.word_ids()]

    def _masking(self) -> Any:
        tokenizer = self.load_tokenizer()
        if tokenizer.mask_token is None and not self.causal():
            fix = "use a masked language model, such as RoBERTa, or a causal one"
            raise ConfigError("task.model", self.model, "a tokenizer with a mask token", fix)
        return tokenizer

    def _cut(self, texts: dict[str, str], excess: int) -> list[int]:
        """A row's prompt, its longest texts cut until it fits; empty where none would be left."""
        causal, template, tokenizer = self.causal(), parsed(self.template), self.load_tokenizer()
        ids: list[int] = []
        while excess > 0:
            name = max(texts, key=lambda name: len(texts[name]))
            spans = tokenizer(texts[name], add_special_tokens=False, return_offsets_mapping=True)[
                "offset_mapping"
            ]
            if len(spans) <= 1:
                return []
            # at least one token is left, for a shorter one of the texts may take the rest
            end = spans[max(1, len(spans) - excess) - 1][1]
            # several tokens may be of one letter, as of an emoji's bytes
            texts = {**texts, name: texts[name][: min(end, len(texts[name]) - 1)]}
            mask = "" if causal else tokenizer.mask_token
            (ids,) = prompt_ids(tokenizer, [template.filled(texts, mask)], causal)
            excess = len(ids) - self.max_tokens
        return ids


@lru_cache(maxsize=4)
def _is_causal(model: str) -> bool:
    config = load_config(model)
    names = config.architectures or ()
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return True
    return config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


@lru_cache(maxsize=4)
def _word_ids(model: str, template: str, words: tuple[str, ...]) -> list[int]:
    return word_tokens(tokenizer_of(model), parsed(template), words, _is_causal(model))
