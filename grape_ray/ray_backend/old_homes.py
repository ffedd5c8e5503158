"""Where Ray Tune's pickles of older sweeps find the classes that they name."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType

_PACKAGE, _MODULE = "grape_ray.orchestrate", "grape_ray.orchestrate.tune"


@contextlib.contextmanager
def old_homes(**classes: type) -> Iterator[None]:
    """For the time of a block, classes are also found by the names that earlier versions gave them.

    Args:
        classes: what the module `grape_ray.orchestrate.tune` held, by its name there.
    """
    homes = {name: ModuleType(name) for name in (_PACKAGE, _MODULE)}
    vars(homes[_MODULE]).update(classes)
    sys.modules.update(homes)
    try:
        yield
    finally:
        for name in homes:
            sys.modules.pop(name, None)
