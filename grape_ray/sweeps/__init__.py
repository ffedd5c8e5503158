"""What a sweep is, what it costs and what it leaves behind; knows no Ray."""

from grape_ray.sweeps.space import SweepStudy

__all__ = ["SweepStudy"]
