"""A sweep's folder: the names of what lies in it, and its description, from which it is resumed and
reported.
"""

from __future__ import annotations

import json

from grape_ray.errors import ConfigError
from grape_ray.storage import Json, Storage

SWEEP_FILE, RESULT_FILE = "sweep.json", "result.json"
RUNS, TUNE = "runs", "tune"
EXECUTED, REPORTS = "executed", "reports"  # append logs below a run's folder
_DESCRIBED = {  # what a description holds at least, and of which types
    "sweep": str, "study": str, "mode": str, "options": dict, "fields": list, "metric": str,
    "config": dict, "ledger": str, "paid": dict, "score_source": str, "budget": list,
}  # fmt: skip


def read(folder: Storage) -> Json:
    """How a sweep was begun. Raises ConfigError where the folder holds no sweep."""
    try:
        found = json.loads(folder.read(SWEEP_FILE))
    except FileNotFoundError as error:
        raise ConfigError(
            "there is no sweep", folder.url, f"a folder with {SWEEP_FILE}", "check name and storage"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{SWEEP_FILE} of the sweep is damaged",
            str(error),
            "a JSON object",
            "restore it from a copy",
        ) from error
    wrong = [
        name
        for name, kind in _DESCRIBED.items()
        if not isinstance(found, dict) or not isinstance(found.get(name), kind)
    ]
    if wrong:
        got, expected = f"no usable {', '.join(wrong)}", "the JSON that its beginning wrote"
        raise ConfigError(
            f"{SWEEP_FILE} of the sweep is damaged", got, expected, "restore it from a copy"
        )
    return found
