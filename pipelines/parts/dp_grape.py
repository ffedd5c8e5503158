"""The settings of the DP-GRAPE paper (arXiv 2506.15588) from which our defaults differ."""

from __future__ import annotations

from grape_ray.storage import Json


def paper_projections(paper: bool, refresh: int) -> Json:
    """Fields of `Method`: the paper's if `paper` (the smaller side compressed, new projections at
    every `refresh`-th step, both moments kept), else none, which leaves the defaults: inputs
    compressed, new projections at every step, and with each the mean of gradients begun anew.
    """
    return {"side": "smaller", "refresh": refresh, "moments": "keep"} if paper else {}
