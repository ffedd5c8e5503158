"""The description of a run (`run.json`), read back and checked."""

from __future__ import annotations

import json

from grape_ray.errors import CheckpointError
from grape_ray.ledger.location import RUN_FILE
from grape_ray.storage import Json, Storage

_RUN = {  # fields of a run's description, and their types
    "run": (str,), "ledger": (str, type(None)), "study": (str,), "seed": (int,), "task": (dict,),
    "privacy": (dict,), "method": (dict,), "performance": (dict,),
}  # fmt: skip
_LATER = ("performance",)  # a field that early descriptions lack
# Tasks of this package that moved: where descriptions of older runs and sweeps say that they live,
# and where they live.
_OLD_HOMES = {
    "grape_ray.models.text_classification": "grape_ray.tasks.text_classification",
    "grape_ray.models.text_generation": "grape_ray.tasks.text_generation",
}


def read_run(folder: Storage) -> Json:
    """The description of a run. Raises CheckpointError where the folder holds none."""
    try:
        return _parsed(folder.read(RUN_FILE))
    except FileNotFoundError as error:
        fix = "name the folder below --storage"
        raise CheckpointError(
            "no run there", folder.url, f"a run's folder, with {RUN_FILE}", fix
        ) from error
    except ValueError as error:
        expected = "the JSON that its beginning wrote"
        raise CheckpointError(
            f"{RUN_FILE} of the run is damaged", str(error), expected, "restore it from a copy"
        ) from error


def _parsed(data: bytes) -> Json:
    """The description of a run, as its file holds it, with what every description has.

    Raises:
        ValueError: why it is none.
    """
    known = json.loads(data)
    if not isinstance(known, dict):
        raise ValueError(f"a {type(known).__name__}, not an object")
    for name, kinds in _RUN.items():
        if name not in known and name not in _LATER:
            raise ValueError(f"no {name}")
        if name in known and not isinstance(known[name], kinds):
            raise ValueError(f"{name} is a {type(known[name]).__name__}")
    if not isinstance(known["task"].get("class"), str) or not isinstance(
        known["task"].get("fields"), dict
    ):
        raise ValueError("a task without its class and fields")
    known["task"] = at_home(known["task"])
    return known


def at_home(task: Json) -> Json:
    """The description of a task, its class where that lives now."""
    module, separator, name = task["class"].partition(":")
    return {**task, "class": f"{_OLD_HOMES.get(module, module)}{separator}{name}"}
