"""Where Ray Tune's pickles of older sweeps find the classes that they name."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def old_homes(**classes: type) -> Iterator[None]:
    """For the time of a block, classes are found in the module that earlier versions kept them in,
    too.

    Args:
        classes: what `grape_ray.orchestrate.tune` held, by its name there.
    """
    package, module = ModuleType("grape_ray.orchestrate"), ModuleType("grape_ray.orchestrate.tune")
    vars(module).update(classes)
    mine = {found.__name__: found for found in (package, module)}
    sys.modules.update(mine)
    try:
        yield
    finally:
        for name in mine:
            sys.modules.pop(name, None)
