"""The record of verification: which kinds of passes were verified, and where the examples lie in
each use of a parameter.
"""

from __future__ import annotations

from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.row_layout import Layout
from grape_ray.engines.capture.tap import Site

Signature = tuple


class Layouts:
    """The kinds of passes that were verified, by the uses of parameters in their order.

    Attributes:
        passes: how often each kind was met. inner_sites: see `RetryPass`.
    """

    def __init__(self) -> None:
        self._known: dict[Signature, list[Layout | None]] = {}
        self.passes: dict[Signature, int] = {}
        self.inner_sites: set[Site] = set()

    def signature(self, capture: CapturePass, training: bool, ragged: bool) -> Signature:
        """The kind of a pass: the mode, whether examples are masked differently, and the uses of
        parameters in their order; where none is followed, the operations in theirs.
        """
        uses = [tap.key for tap in capture.taps] or [capture.dependence.path]
        return training, ragged, capture.examples == 1, *uses

    def fitted(self, signature: Signature, capture: CapturePass) -> bool:
        """Gives the taps of a pass the layouts that an earlier one had; whether there was one, and
        all layouts follow from it.
        """
        known = self._known.get(signature, self._known.get((capture.examples, signature)))
        if known is None:
            return False
        for tap, layout in zip(capture.taps, known):
            tap.layout = layout and layout.fitted(tap.lead, capture.examples)
            if layout is not None and tap.layout is None:
                return False
        return True

    def remember(self, signature: Signature, capture: CapturePass) -> None:
        """Keeps the layouts of a verified pass, unless its gradients allow two layouts of
        one.
        """
        if not all(tap.unambiguous for tap in capture.taps):
            return
        # A loop over the examples has as many uses as examples: known for this B alone.
        single = capture.examples > 1 and any(
            tap.layout is not None and tap.layout.only is not None for tap in capture.taps
        )
        self._known[(capture.examples, signature) if single else signature] = [
            tap.layout for tap in capture.taps
        ]
