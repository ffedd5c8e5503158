"""Hugging Face models and tokenizers by hub name or folder, with errors that say what is missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn

from grape_ray.errors import ConfigError

_T = TypeVar("_T")


def load_tokenizer(name: str) -> Any:
    """The fast tokenizer of a hub name or folder. Raises ConfigError where there is none."""
    return _load(name, lambda place: transformers.AutoTokenizer.from_pretrained(place, use_fast=True, trust_remote_code=False))


def load_sequence_classifier(name: str, classes: int, seed: int, dropout: bool = False) -> nn.Module:
    """An encoder or decoder with a fresh classification head.

    Args:
        name: hub name, or a folder with config.json and weights. classes: number of labels.
        seed: public seed of the new head. dropout: whether the model stays in training mode; otherwise its dropout is off.

    Raises:
        ConfigError: no such model, or it cannot classify sequences.
    """

    def build(place: str) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return transformers.AutoModelForSequenceClassification.from_pretrained(
                place, num_labels=classes, dtype=torch.float32, trust_remote_code=False
            )

    return _load(name, build).train(dropout)


def load_causal_lm(name: str, seed: int) -> nn.Module:
    """A decoder with its language-modelling head, fp32, dropout off.

    Args:
        name: hub name, or a folder with config.json and weights. seed: public seed of whatever the weights leave out.

    Raises:
        ConfigError: no such model, or it does not generate text.
    """

    def build(place: str) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, trust_remote_code=False)

    return _load(name, build).eval()


def save_pretrained(model: nn.Module, folder: Path) -> None:
    """Writes a Hugging Face model's folder, without progress bars."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]


def _load(name: str, build: Callable[[str], _T]) -> _T:
    """`build` on the hub name or expanded folder, with one clear error for all that can be wrong with it."""
    place = os.path.expanduser(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(place, "config.json").is_file():
        raise ConfigError("task.model", name, "a hub name, or a folder with config.json and weights", "check the path")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return build(place)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError("task.model cannot be loaded", name, "a hub name, or a folder with config.json and weights", reason) from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def load_as_saved(name: str) -> nn.Module:
    """A model in the architecture that its config names, fp32, in eval mode. Raises ConfigError where it cannot be loaded."""

    def build(place: str) -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        return kind.from_pretrained(place, dtype=torch.float32)

    return _load(name, build).eval()
