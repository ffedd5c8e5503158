"""Settings to begin with, by task and model: what `grape-ray init` writes. docs/choosing.md says
where each comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from grape_ray.accounting.batches import largest_batch

# parts of names of sentence encoders that were trained for the mean of their tokens
_MEAN_POOLED = ("all-minilm", "e5-", "gte-")
_FEWEST, _SMALLEST_BATCH = 60, 16


@dataclass(frozen=True)
class Recipe:
    """What to train, and how.

    Attributes:
        why: one line for the file. task, method: fields and their values as YAML.
        epochs: passes over the privacy units.
    """

    why: str
    method: Mapping[str, str]
    task: Mapping[str, str] = field(default_factory=dict)
    epochs: float = 6

    def batch(self, units: int) -> int:
        """The expected batch size for so many units: the largest that leaves enough steps."""
        most = max(1, units // 2)
        return min(most, max(_SMALLEST_BATCH, largest_batch(units, self.epochs)))

    def steps(self, units: int) -> int:
        return max(_FEWEST, round(self.epochs * units / self.batch(units)))


_SCHEDULE = {"warmup_steps": "5", "schedule": "linear"}
_HEAD = {"name": "bookkeeping", "learning_rate": "3.0e-2", **_SCHEDULE}
_ALL_LAYERS = {"name": "grape", "rank": "16", "learning_rate": "3.0e-4", **_SCHEDULE}


def recipe(kind: str, model: str) -> Recipe:
    """The recipe for a kind of task and a model's name.

    >>> recipe("text-classification", "sentence-transformers/all-MiniLM-L6-v2").task["pooling"]
    'mean'
    >>> recipe("text-generation", "facebook/opt-125m").method["name"]
    'grape'
    """
    head = {"trainable": '["classifier.*"]'}
    if kind in ("text-classification", "regression") and _is_mean_pooled(model):
        why = "a head on frozen sentence embeddings: few numbers are noised"
        return Recipe(why, _HEAD, {"pooling": "mean", **head})
    if kind == "image-classification":
        why = "a head on a frozen pretrained model: few numbers are noised"
        return Recipe(why, _HEAD, head)
    return Recipe("all layers, in few coordinates", _ALL_LAYERS)


def _is_mean_pooled(model: str) -> bool:
    return any(part in model.lower() for part in _MEAN_POOLED)
