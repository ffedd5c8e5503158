"""What earlier passes have shown: the kinds of passes that were verified, and where the examples lie in each."""

from __future__ import annotations

from grape_ray.engines.owners import Layout
from grape_ray.engines.session import Session, Way

Signature = tuple


class Layouts:
    """The kinds of passes that were verified: where the examples lie at each use, and how often a kind was met.

    A kind is the order in which uses of parameters first appear. Uses that look alike (the steps of a recurrent layer) share a layout
    where that holds; where it does not (a loop over the examples) the kind counts them all.
    """

    def __init__(self) -> None:
        self._by_use: dict[Signature, dict[tuple, Layout | None]] = {}
        self._in_order: dict[Signature, list[Layout | None]] = {}
        self.passes: dict[Signature, int] = {}
        self.inside: set[Way] = set()

    def signature(self, session: Session, training: bool) -> Signature:
        """The kind of a pass."""
        return training, session.rows == 1, *dict.fromkeys(tap.key for tap in session.taps)

    def fitted(self, signature: Signature, session: Session) -> bool:
        """Gives the session's taps the layouts that an earlier pass had; whether there was one, and all follow from it."""
        known = self._by_use.get(signature)
        layouts = [known[tap.key] for tap in session.taps] if known else self._in_order.get((signature, len(session.taps)))
        if layouts is None:
            return False
        for tap, layout in zip(session.taps, layouts):
            tap.layout = layout and layout.fitted(tap.lead, session.rows)
            if layout is not None and tap.layout is None:
                return False
        return True

    def remember(self, signature: Signature, session: Session) -> None:
        """Keeps the layouts of a verified pass."""
        by_use: dict[tuple, Layout | None] = {}
        for tap in session.taps:
            layout = by_use.setdefault(tap.key, tap.layout)
            if layout != tap.layout and (layout is None or layout.fitted(tap.lead, session.rows) != tap.layout):
                self._in_order[signature, len(session.taps)] = [tap.layout for tap in session.taps]
                return
        if any(layout is not None and layout.only is not None for layout in by_use.values()) and session.rows > 1:
            self._in_order[signature, len(session.taps)] = [tap.layout for tap in session.taps]
        else:
            self._by_use[signature] = by_use
