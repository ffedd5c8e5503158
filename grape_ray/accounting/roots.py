"""The last point at which an increasing function is not above zero, found with few of its values:
each costs a composition.
"""

from __future__ import annotations

from collections.abc import Callable


def boundary(
    excess: Callable[[float], float],
    start: float,
    bounds: tuple[float, float],
    width: float,
    reach: float,
) -> float | None:
    """The largest x within bounds with excess(x) <= 0, to the width and from below, for an
    increasing excess; None where there is none.

    Gallops from the start, then halves by false position (Illinois), kept off both ends so that the
    bracket closes from both sides.
    """
    x, fx = start, excess(start)
    sign = 1.0 if fx <= 0 else -1.0
    while True:
        y = min(bounds[1], max(bounds[0], x + sign * reach))
        if y == x:
            return x if sign > 0 else None
        fy = excess(y)
        if (fy <= 0) != (fx <= 0):
            break
        x, fx, reach = y, fy, 2 * reach
    (good, f_good), (bad, f_bad) = ((x, fx), (y, fy)) if sign > 0 else ((y, fy), (x, fx))
    last = 0
    while bad - good > width:
        middle = good + (bad - good) * f_good / (f_good - f_bad)
        middle = min(bad - width / 2, max(good + width / 2, middle))
        value = excess(middle)
        if value <= 0:
            # an end that stays twice is given half its value, or the other alone would move
            good, f_good, f_bad = middle, value, f_bad / 2 if last == 1 else f_bad
            last = 1
        else:
            bad, f_bad, f_good = middle, value, f_good / 2 if last == -1 else f_good
            last = -1
    return good
