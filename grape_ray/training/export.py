"""From a run's newest checkpoint to a folder that Hugging Face loads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from grape_ray.config.description import read_run, rebuild_config
from grape_ray.config.methods import METHODS
from grape_ray.config.schema import Config
from grape_ray.errors import StorageError
from grape_ray.storage import Json, Storage
from grape_ray.training.build import newest_checkpoint, trained_model

PRIVACY_FILE = "privacy.json"


def export(run: str, folder: str | os.PathLike[str], trust: Iterable[str] = ()) -> int:
    """Writes the model of a run's newest whole checkpoint for `AutoModel....from_pretrained`;
    returns the checkpoint's step.

    A file `privacy.json` in the folder says what is guaranteed to the training records, or that
    nothing is.

    Args:
        run: path or URL of the run's folder. folder: local folder to make; it appears whole or not
            at all.
        trust: modules that the run's description may have imported, beside this project's own: a
            run is a folder that anyone may have made.

    Raises:
        CheckpointError: no run or no whole checkpoint there. ConfigError: its task's module is not
            trusted.
        StorageError: `folder` is taken or cannot be made.
    """
    place, target = Storage(run), Path(folder).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StorageError(
            "the folder to export to is taken",
            str(target),
            "a new or an empty folder",
            "choose another",
        )
    known = read_run(place)
    config = rebuild_config(known, trust)
    newest = newest_checkpoint(place)
    model = trained_model(config, newest)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # beside the target, so that the move is a rename
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as scratch:
            config.task.save(model, Path(scratch, "model"))
            Path(scratch, "model", PRIVACY_FILE).write_text(
                json.dumps(_statement(config, known["study"], newest.step), indent=1) + "\n"
            )
            if target.exists():
                target.rmdir()
            shutil.move(Path(scratch, "model"), target)
    except OSError as error:
        raise StorageError(
            "the export cannot be written", str(target), "a folder that you may make", str(error)
        ) from error
    return newest.step


def _statement(config: Config, study: str, step: int) -> Json:
    """What may be said of the exported model's privacy."""
    trained = {"method": config.method.name, "steps": step}
    if not METHODS[config.method.name].private:
        statement = (
            "NOT PRIVATE: trained without any guarantee; whoever has this model may learn what is"
            " in its training records"
        )
        return {"private": False, "statement": statement, **trained}
    privacy = config.privacy  # a trial's holds the target of its whole sweep
    unit = f"all training records of one unit ({privacy.unit})" if privacy.unit else ""
    statement = (
        "(epsilon, delta)-differentially private with respect to adding or removing"
        f" {unit or 'one training record'}"
    )
    return {
        "private": True,
        "statement": statement,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "unit": privacy.unit_name,
        "examples_per_unit": privacy.unit_limit,
        "study": study,
        **trained,
    }
