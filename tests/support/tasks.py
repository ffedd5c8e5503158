"""What tests of tasks share: a tokenizer of whole words, and a private run from its start to the
folder that it exports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.ray_backend.train import train
from grape_ray.training.export import export
from grape_ray.training.result import RunResult

WORDS = ["grape", "wine", "rain", "stone", "glass", "salt", "tree", "fish", "milk", "corn"]
SPECIAL = ["[PAD]", "[UNK]", "[MASK]", "[END]"]
TOKENS = len(SPECIAL) + len(WORDS)


def save_tokenizer(folder: Path, end: bool = False) -> None:
    """A tokenizer of `WORDS`, saved.

    Args:
        end: whether each text ends in a token of its own.
    """
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        words.post_processor = processors.TemplateProcessing(
            single="$A [END]", special_tokens=[("[END]", SPECIAL.index("[END]"))]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        eos_token="[END]",
    ).save_pretrained(folder)


def trained(task: Any, folder: Path, **privacy: Any) -> tuple[RunResult, Path]:
    """What two private steps gave, and the folder of the exported model."""
    config = Config(
        task=task,
        privacy=Privacy(**{"expected_batch_size": 12, "steps": 2, "delta": 1e-4, **privacy}),
        method=Method(rank=4, project_min_numel=256),
        performance=Performance(micro_batch_size=8),
    )
    runs = folder / "runs"
    result = train(config, run="t", storage=str(runs), key_path=str(folder / "key"))
    assert result.steps == result.charged_steps == 2
    export(str(runs / "t"), folder / "out")
    return result, folder / "out"
