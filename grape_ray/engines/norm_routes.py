"""How a weight's per-example norm is computed, decided per call from shapes alone.

B examples, T positions (of all uses together), O and I the weight's sides, K probes.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable

from grape_ray.errors import ConfigError, nearest

ROUTES = ("gram", "instantiate", "sketch")


def norm_route(positions: int, outputs: int, inputs: int, probes: int | None = None) -> str:
    """The cheapest way to a squared norm.

    Without probes the rule of Book-Keeping's MixOpt (Bu et al. 2022): the Gram trick iff 2 T^2 <= O
    I, else instantiate, which compares the memory of two T x T products with that of one gradient.
    With probes an estimate (Hutchinson) is chosen where it needs fewer multiplications than an
    instantiated gradient, T K (O + I) against T O I: a matter of the weight alone. Were it one of T
    too, an example could by its length decide whether the others of its batch are estimated, which
    no proof covers.

    Args:
        positions: T. outputs, inputs: O, I. probes: K, or None where only exact norms are allowed.

    Returns:
        `gram`, `instantiate` or `sketch`.
    """
    if probes is not None and probes * (outputs + inputs) < outputs * inputs:
        return "sketch"
    return "gram" if 2 * positions**2 <= outputs * inputs else "instantiate"


def overridden(name: str, overrides: Iterable[tuple[str, str]]) -> str | None:
    """The route that the first matching (pattern, route) sets for parameter `name`, if any."""
    return next((route for pattern, route in overrides if fnmatch.fnmatch(name, pattern)), None)


def check_patterns(field: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Refuses a pattern that matches no parameter: it would be passed over without a word. Raises
    ConfigError with the nearest names.
    """
    known = list(names)
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            parts = {
                name.rsplit(".", cut)[0] for name in known for cut in range(name.count(".") + 1)
            } | {p for n in known for p in n.split(".")}
            near = difflib.get_close_matches(pattern.strip("*?."), sorted(parts), n=3, cutoff=0.5)
            fix = (
                "did you mean " + " or ".join(map(repr, near)) + "?"
                if near
                else f"the first of {len(known)} is {known[0]!r}"
            )
            raise ConfigError(
                f"{field} matches no parameter of the model",
                pattern,
                "a pattern (fnmatch) of their names",
                fix,
            )


def parse_overrides(texts: Iterable[str], estimates: bool) -> tuple[tuple[str, str], ...]:
    """`pattern:route` texts as pairs. Raises ConfigError for an unknown route, or for `sketch`
    under an exact method.
    """
    pairs = []
    for text in texts:
        pattern, _, route = text.rpartition(":")
        known = ROUTES if estimates else ROUTES[:2]
        if not pattern or route not in known:
            raise ConfigError(
                "method.routes",
                text,
                "pattern:route with a route of " + ", ".join(known),
                nearest(route, known),
            )
        pairs.append((pattern, route))
    return tuple(pairs)
