"""Batches of records for whoever looks at a model without training it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from grape_ray.data.arrays import Records
from grape_ray.tasks.task import evaluating, to_device


class Collates(Protocol):
    """What makes batches of records, as every task does."""

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]: ...


def batches(
    task: Collates, model: nn.Module, records: Records, size: int = 64
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """All records, those of one length together: their indices (B,), and the batch on the model's
    device. The model is in eval mode, and nothing is tracked for gradients, until the last one.
    """
    device = next(model.parameters()).device
    order = records.by_length(np.arange(len(records)))
    with evaluating(model), torch.no_grad():
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            yield indices, to_device(task.collate(records, indices), device)


def padded_batch(
    records: Records, indices: np.ndarray, fill: int, ignored: int
) -> dict[str, Tensor]:
    """Token ids and the mask of real ones, (B, T) each, and labels, where there are any, which are
    sequences, too.

    Args:
        fill: the token that fills ids up. ignored: what fills labels up.
    """
    ids, mask = records.sequences("input_ids").padded(indices, fill)
    batch = {"input_ids": ids, "attention_mask": mask}
    if "labels" in records.columns:
        batch["labels"] = records.sequences("labels").padded(indices, ignored)[0]
    return batch
