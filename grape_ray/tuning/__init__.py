"""Sweeps without Ray: tune spaces, prices, results and the page."""

from grape_ray.tuning.spaces import SweepStudy

__all__ = ["SweepStudy"]
