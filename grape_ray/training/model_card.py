"""The README.md of an exported model: what it is, what is guaranteed to its training records, and
what is not.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

from grape_ray.config.schema import Config
from grape_ray.storage import Json

_PACKAGES = ("grape-ray", "torch", "transformers", "dp-accounting")
_NOT_PROTECTED = (
    "the base model and its tokenizer, whose own training data had no part in this guarantee",
    "the names and number of labels, the shapes of the model, and the settings below",
    "metrics on validation records, which count as public unless a sweep paid for a noised score",
    "more than one unit: of a person with several, each is protected, not all of them together",
)
_HEAD = """---
library_name: transformers
tags:
- differential-privacy
- grape-ray
---

# {name}

{base}Trained by grape-ray with method `{method}` for {steps} steps.

## Privacy

{statement}

"""


def model_card(
    config: Config, statement: Json, metadata: Mapping[str, object], noise: float | None
) -> str:
    """The card, in Markdown.

    Args:
        statement: what `privacy.json` says. metadata: of the checkpoint that was exported. noise:
            the noise multiplier; None where it is not known.
    """
    base = str(getattr(config.task, "model", ""))
    if base.startswith((".", "/", "~")):  # the name of a folder, not where it lay
        base = Path(base).name
    text = _HEAD.format(
        name=config.task.name,
        base=f"Fine-tuned from `{base}`. " if base else "",
        method=config.method.name,
        steps=statement["steps"],
        statement=_guarantee(statement),
    )
    if statement["private"]:
        text += _table(_settings(config, statement, metadata, noise))
        text += "\nNot protected:\n\n" + "".join(f"* {line}\n" for line in _NOT_PROTECTED)
    metrics = metadata.get("metrics")
    if isinstance(metrics, Mapping) and metrics:
        text += "\n## Validation\n\n"
        text += _table({name: f"{value:.4f}" for name, value in metrics.items()})
    return text + "\n## Versions\n\n" + _table(_versions())


def _guarantee(statement: Json) -> str:
    if not statement["private"]:
        return f"**{statement['statement']}.**"
    return (
        f"**epsilon {statement['epsilon']:g} at delta {statement['delta']:g}.** The weights are"
        f" {statement['statement']}. `privacy.json` says the same to programs."
    )


def _settings(
    config: Config, statement: Json, metadata: Mapping[str, object], noise: float | None
) -> dict[str, str]:
    privacy = config.privacy
    sampling = f"Poisson, {privacy.expected_batch_size} {privacy.units_name} a step on average"
    found = {
        "privacy unit": str(statement["unit"]),
        "sampling": sampling,
        "mechanism": f"Gaussian, clip norm {privacy.clip_norm:g}, clipping {privacy.clipping}",
        "study in the ledger": str(statement["study"]),
        "ledger head": str(metadata.get("ledger_head")),
    }
    if statement["examples_per_unit"]:
        found["records of a unit a step"] = f"at most {statement['examples_per_unit']}"
    if noise is not None:
        found["noise multiplier"] = f"{noise:.4g}"
    return found


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _table(rows: Mapping[str, str]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())
