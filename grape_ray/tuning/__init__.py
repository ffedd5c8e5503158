"""What a sweep is, what it costs and what it leaves behind; knows no Ray."""

from grape_ray.tuning.spaces import SweepStudy

__all__ = ["SweepStudy"]
