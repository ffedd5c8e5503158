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
_HEAD_EPOCHS = 20  # the frozen model reads each record once, whatever their number
_MANY = 50_000  # units: with fewer, layers beside the head were not measured


@dataclass(frozen=True)
class Recipe:
    """What to train, and how.

    Attributes:
        why: one line for the file. task, privacy, method, performance: fields and their values as
            YAML.
        epochs: passes over the privacy units.
    """

    why: str
    method: Mapping[str, str]
    task: Mapping[str, str] = field(default_factory=dict)
    privacy: Mapping[str, str] = field(default_factory=dict)
    performance: Mapping[str, str] = field(default_factory=dict)
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
_UPPER_HALF = Recipe(  # that of pipelines.sst2
    "the upper half of the layers in few coordinates, and a head: enough records for it",
    {
        "name": "grape", "rank": "16", "moments": "lifted", "learning_rate": "1.4e-3",
        "rates": '["classifier.*:4"]', **_SCHEDULE,
    },
    {"pooling": "mean", "trainable": '["upper-half", "classifier.*"]'},
    {"clip_norm": "10  # about the gradients' norms at the start, which the dry run can show"},
    {"precision": "bf16"},
    epochs=9,
)  # fmt: skip


def recipe(kind: str, model: str, units: int) -> Recipe:
    """The recipe for a kind of task, a model's name, and a number of privacy units.

    >>> encoder = "sentence-transformers/all-MiniLM-L6-v2"
    >>> recipe("text-classification", encoder, 10_000).task["trainable"]
    '["classifier.*"]'
    >>> recipe("text-classification", encoder, 60_000).task["trainable"]
    '["upper-half", "classifier.*"]'
    >>> recipe("text-generation", "facebook/opt-125m", 10_000).method["name"]
    'grape'
    """
    head = {"trainable": '["classifier.*"]'}
    if kind == "text-classification" and _is_mean_pooled(model) and units >= _MANY:
        return _UPPER_HALF
    if kind in ("text-classification", "regression") and _is_mean_pooled(model):
        why = "a head on frozen sentence embeddings: few numbers are noised"
        return Recipe(why, _HEAD, {"pooling": "mean", **head}, epochs=_HEAD_EPOCHS)
    if kind == "image-classification":
        why = "a head on a frozen pretrained model: few numbers are noised"
        return Recipe(why, _HEAD, head, epochs=_HEAD_EPOCHS)
    return Recipe("all layers, in few coordinates", _ALL_LAYERS)


def _is_mean_pooled(model: str) -> bool:
    return any(part in model.lower() for part in _MEAN_POOLED)
