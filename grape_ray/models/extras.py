"""Libraries that only some models and metrics need: imported when they do."""

from __future__ import annotations

import importlib
from typing import Any

from grape_ray.errors import ConfigError


def needed(module: str, by: str, extra: str, otherwise: str = "") -> Any:
    """A module, imported.

    Args:
        by: what needs it. extra: of this package, that installs it. otherwise: what to do without.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        fix = f"pip install 'grape-ray[{extra}]'" + (f", or {otherwise}" if otherwise else "")
        raise ConfigError(f"{by} needs a library", "no such module", module, fix) from error
