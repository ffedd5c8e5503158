"""What the tasks on texts in tables have in common: where the model and the records are, and the
tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from grape_ray.errors import ConfigError
from grape_ray.models.hugging_face import load_tokenizer


@dataclass(frozen=True)
class TextTables:
    """One row of a table is one example, and so one unit of the guarantee.

    Attributes:
        model: hub name or folder of a pretrained model; public, like its tokenizer: not made from
            the training data.
        train, validation: Parquet file, folder, pattern or URL (`hf://datasets/...`, `s3://...`).
        text_column: name of the column of texts.
        limit: keep the first so many training rows; 0 keeps all.
        public: whether the training data holds nobody's secrets (a public benchmark), so that each
            run may have a ledger of its own.
    """

    model: str
    train: str
    validation: str
    text_column: str = "text"
    limit: int = 0
    public: bool = False

    def check_at_least(self, **lowest: int) -> None:
        """Raises ConfigError where a field is below the number given for it."""
        for field, low in lowest.items():
            if getattr(self, field) < low:
                raise ConfigError(
                    f"task.{field}",
                    getattr(self, field),
                    f"an integer >= {low}",
                    "set another value",
                )


@lru_cache(maxsize=4)
def tokenizer_of(name: str, field: str = "task.model") -> Any:
    """The tokenizer of a hub name or folder; each is loaded once a process, which takes a second.

    Args:
        field: the task's field that names it, for errors.
    """
    return load_tokenizer(name, field)
