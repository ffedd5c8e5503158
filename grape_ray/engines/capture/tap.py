"""One use of a parameter by the batch, and what can be found out about it during a pass."""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from grape_ray.engines.capture.row_layout import Layout
from grape_ray.errors import UnsupportedLayer


class Phase(enum.Enum):
    """What a pass is doing: the loss's forward pass, a verification of it, or the backward pass
    whose gradients count.
    """

    FORWARD = "forward"
    VERIFY = "verify"
    BACKWARD = "backward"


# Where a shared value meets the batch: the number of taps before it, the shape of the value (or
# the shapes of the arguments), and the shape that it meets.
Site = tuple[int, tuple, tuple]


class RetryPass(Exception):
    """The batch is not where the sizes of shared values suggested: the pass has to be made again.

    Attributes:
        sites: where the batch lies inside the value, along its own rows, and not along the
            dimensions to which it is expanded; or where arguments of unknown origin are constant.
    """

    def __init__(self, sites: set[Site]):
        super().__init__(sites)
        self.sites = sites


class UnverifiedUse(Exception):
    """A gradient arrived at a use where none did when this kind of pass was verified, so that
    nothing is known of its rows.
    """


class Tap:
    """One use of a parameter by the batch: where backward brings gradients that belong to examples.

    Attributes:
        key: (parameters, operation, number of leading dimensions). lead: the leading dimensions of
            what is used.
        layout: whose row is whose, once it is known.
        evidence: what arrived for each group of examples whose losses went backward alone: sums
            (2, *lead) over the features, of the gradient and of its magnitudes.
        consistent: all layouts that the evidence allows, where it was gathered. unambiguous:
            whether they are one.
        recorded: whether the forward pass has met this use.
        site: where a shared value meets the batch; None for all other uses.
    """

    __slots__ = (
        "consistent", "evidence", "key", "layout", "lead", "recorded", "site", "unambiguous"
    )  # fmt: skip

    def __init__(self, key: tuple[str, str, int], lead: tuple[int, ...]):
        self.key, self.lead = key, lead
        self.layout: Layout | None = None
        self.evidence: list[Tensor] = []
        self.consistent: list[Layout] = []
        self.unambiguous, self.recorded = True, False
        self.site: Site | None = None

    def add_evidence(self, grad: Tensor) -> None:
        """Notes what arrived, (*lead, *features), in a verification."""
        grad = torch.view_as_real(grad) if grad.is_complex() else grad
        features = list(range(len(self.lead), grad.ndim))
        wide = grad if features else grad.unsqueeze(-1)
        features = features or [-1]
        sums = (
            # magnitudes show what is exactly zero, where a sum may cancel; sums tell gradients
            # apart
            wide.sum(features, dtype=torch.float64),
            wide.abs().sum(features, dtype=torch.float64),
        )
        self.evidence.append(torch.stack(sums))


def bypassed(label: str) -> UnsupportedLayer:
    """The refusal of a use that no tap sees."""
    return UnsupportedLayer(
        f"parameter {label} is used where torch functions are not seen",
        "a gradient of the whole batch (torch.jit, an autograd.Function of your own, vmap over it,"
        " a reference kept outside its module)",
        "uses as torch functions of what the module's own attribute holds",
        "freeze it (requires_grad=False), or write the operation with torch functions",
    )
