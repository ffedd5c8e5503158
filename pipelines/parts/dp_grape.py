"""The settings of the DP-GRAPE paper (arXiv 2506.15588) that this package's defaults differ from."""

from __future__ import annotations

from typing import Any


def paper_projections(paper: bool, refresh: int, dense: tuple[str, ...]) -> dict[str, Any]:
    """Fields of `Method`: the paper's if `paper`, else none, which leaves the defaults: inputs
    compressed, new projections at every step, the mean of gradients begun anew with each, and
    whatever is large enough projected.

    Args:
        refresh: the paper's number of steps between new projections. dense: patterns of what it
            leaves as it is: embeddings, heads; there it also compresses the smaller side, and
            keeps both moments.
    """
    if not paper:
        return {}
    return {"side": "smaller", "refresh": refresh, "moments": "keep", "dense": dense}
