"""Passes over shapes alone, in which there is no value to verify anything by."""

from __future__ import annotations

from torch import Tensor

from grape_ray.engines.capture import row_layout
from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.tap import Phase
from grape_ray.engines.verification.forward import Forward, Verifier
from grape_ray.errors import GrapeRayError


class Assumed(Verifier):
    """Takes rows to be consecutive, on the meta device and nowhere else."""

    def losses(self, capture: CapturePass, forward: Forward) -> Tensor:
        """The losses (B,) of one pass. Raises GrapeRayError where there are values."""
        if capture.device.type != "meta":
            raise GrapeRayError(
                "a pass that is not verified", f"on {capture.device}", "shapes on the meta device"
            )
        found = forward.losses(capture)
        for tap in capture.taps:
            tap.layout = next(row_layout.candidates(tap.lead, capture.examples))
            tap.unambiguous = True
        capture.phase = Phase.BACKWARD
        return found
