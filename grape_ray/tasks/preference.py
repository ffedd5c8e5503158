"""A task: fine-tune a causal language model on pairs of answers of which one was preferred, by
direct preference optimization (DPO).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grape_ray.data.arrays import Ragged, Records
from grape_ray.data.columns import Table
from grape_ray.data.prepared import Columns
from grape_ray.errors import ConfigError
from grape_ray.models.from_scratch import is_scratch
from grape_ray.models.hugging_face import load_language_model
from grape_ray.models.identity import model_identity
from grape_ray.storage import Json
from grape_ray.tasks.batches import batches
from grape_ray.tasks.decoders import PAD, DecoderTask, learned_tokens, next_token_losses

_ROWS = 4  # pairs looked at together, outside of training
_STEPS = 1024  # a nat of the reference


@dataclass(frozen=True)
class Preference(DecoderTask):
    """An example is a prompt with two answers. Its loss is -log sigmoid(beta * margin), where the
    margin is by how much more the log-probability of the chosen answer rose, over that of the
    model at step 0, than that of the rejected one (Rafailov et al. 2023). The other fields are
    those of DecoderTask.

    What the model at step 0 gives is computed once, where records are prepared: a function of each
    record and of a public model.

    Attributes:
        prompt_column, chosen_column, rejected_column: names of columns of texts.
        beta: how much a margin counts.
    """

    bounded_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    beta: float = 0.1
    name: str = "preference"

    def check_fields(self) -> None:
        super().check_fields()
        if not 0 < self.beta < float("inf"):
            raise ConfigError("task.beta", self.beta, "a number > 0")
        if is_scratch(self.model):
            what, fix = "task.model of preference pairs", "name a model that has learned to write"
            raise ConfigError(what, self.model, "pretrained weights, which are the reference", fix)

    @property
    def columns(self) -> Columns:
        answers = (self.chosen_column, self.rejected_column)
        named = (self.prompt_column, *answers)
        return Columns(named, named, answers, computed=("reference",))

    @property
    def input_columns(self) -> Columns:
        """The columns from which `predict` generates."""
        return Columns((self.prompt_column,), (self.prompt_column,))

    def reader(self) -> str:
        """What reads the texts, and what gives the reference."""
        return f"{super().reader()}|{model_identity(self.model)}|{self.weights}"

    def encode(self, table: Table, facts: Json) -> Records:
        """Token ids of both answers after the prompt, how many are the prompt's, and the
        log-probabilities (N, 2) of the answers at step 0.
        """
        prompts = self.prompts(table.texts(self.prompt_column))
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        lost = np.flatnonzero(lengths >= self.max_tokens)
        expected = f"a prompt of fewer than max_tokens = {self.max_tokens} tokens"
        table.refuse_rows("no room for an answer", lost, expected, "raise task.max_tokens")
        chosen, rejected = (
            Ragged.of(self.answered(prompts, table.texts(column))[0])
            for column in (self.chosen_column, self.rejected_column)
        )
        records = Records({"chosen": chosen, "rejected": rejected, "prompt": lengths})
        return Records({**records.columns, "reference": self._reference(records)})

    def inputs(self, table: Table) -> dict[str, Ragged]:
        """Token ids of the prompts."""
        return {"input_ids": Ragged.of(self.prompts(table.texts(self.prompt_column)))}

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        """Both answers, the chosen one first: token ids (B, 2, T), which of them are learned, and
        the reference (B, 2).
        """
        starts = torch.from_numpy(records.array("prompt")[indices])
        found = [records.sequences(n).padded(indices, PAD) for n in ("chosen", "rejected")]
        longest = max(ids.shape[1] for ids, _ in found)
        ids, real = (
            torch.stack([F.pad(t, (0, longest - t.shape[1]), value=PAD) for t in parts], 1)
            for parts in zip(*found)
        )
        answers = torch.arange(longest) >= starts.view(-1, 1, 1)
        batch = {"ids": ids, **learned_tokens(ids, answers & (real > 0))}
        if "reference" in records.columns:
            batch["reference"] = torch.from_numpy(records.array("reference")[indices])
        return batch

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return -F.logsigmoid(self.beta * _margin(model, batch))

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """How often the chosen answer gained more than the rejected one; the mean margin in nats,
        before `beta`; and mean loss.
        """
        right, margin, loss = 0, 0.0, 0.0
        for _, batch in batches(self, model, records, _ROWS):
            found = _margin(model, batch).double()
            right += int((found > 0).sum())
            margin += float(found.sum())
            loss -= float(F.logsigmoid(self.beta * found).sum())
        count = len(records)
        return {"accuracy": right / count, "margin": margin / count, "loss": loss / count}

    def _reference(self, records: Records) -> np.ndarray:
        """Log-probabilities (N, 2) of the answers under the model at step 0, where it is fastest.

        They are rounded, so that records alike have the same ones whatever they are padded with.
        The model is loaded anew for some thousand records, so that none stays in memory.
        """
        model: nn.Module = load_language_model(self.model, 0, weights=self.weights)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        found = np.empty((len(records), 2), dtype=np.float32)
        for indices, batch in batches(self, model, records, _ROWS):
            given = _answers(model, batch).double().cpu().numpy()
            found[indices] = np.round(given * _STEPS) / _STEPS
        return found


def _margin(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B,): by how much more the chosen answer's log-probability rose than the rejected one's."""
    rose = _answers(model, batch) - batch["reference"]
    return rose[:, 0] - rose[:, 1]


def _answers(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, 2): the log-probability of each answer, a sum over its tokens."""
    read = (batch[name].flatten(0, 1) for name in ("ids", "places", "targets"))
    losses, _ = next_token_losses(model, *read)
    return -losses.sum(1).view(-1, 2)
