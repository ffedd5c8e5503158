"""What is done with an operation on parameters whose per-example gradient has a closed form."""

from grape_ray.engines.capture.dispatch import find
from grape_ray.engines.rules import composite, layers

__all__ = ["composite", "find", "layers"]
