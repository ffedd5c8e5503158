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
from grape_ray.errors import ConfigError, StorageError
from grape_ray.storage import Json, Storage
from grape_ray.training.build import newest_checkpoint, trained_model
from grape_ray.training.model_card import model_card
from grape_ray.training.predict import TASK_FILE, describe_exported
from grape_ray.training.result import RESULT_FILE, read_result

PRIVACY_FILE = "privacy.json"


def export(run: str, folder: str | os.PathLike[str], trust: Iterable[str] = ()) -> int:
    """Writes the model of a run's newest whole checkpoint for `AutoModel....from_pretrained`;
    returns the checkpoint's step.

    A file `privacy.json` in the folder says what is guaranteed to the training records, or that
    nothing is; README.md, the model card, says it to people.

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
            made = Path(scratch, "model")
            config.task.save(model, made)
            stated = _statement(config, known["study"], newest.step)
            (made / PRIVACY_FILE).write_text(json.dumps(stated, indent=1) + "\n")
            (made / TASK_FILE).write_text(describe_exported(config.task))
            noise = read_result(place).noise_multiplier if place.exists(RESULT_FILE) else None
            (made / "README.md").write_text(model_card(config, stated, newest.metadata, noise))
            if target.exists():
                target.rmdir()
            shutil.move(made, target)
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


def push(folder: str | os.PathLike[str], name: str) -> str:
    """Puts an exported folder on the Hugging Face hub, as a private repository; returns its URL.

    Raises:
        ConfigError: no token is set. StorageError: the hub refuses, or cannot be reached.
    """
    import huggingface_hub

    if not huggingface_hub.get_token():
        fix = "run `hf auth login`, or set HF_TOKEN"
        raise ConfigError("--push-to-hub", "no token", "a token that may write", fix)
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=name)
    except Exception as error:  # of the network or the hub
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise StorageError(
            "the model cannot be put on the hub", name, "owner/name", reason
        ) from None
    return str(url)
