"""The precision that the proof assumes for norms, factors and sums, whatever autocast or TF32 says
outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

# where tensors have shapes and no device, torch has no autocast: what is assumed in its place
_ASSUMED: ContextVar[torch.dtype | None] = ContextVar("assumed autocast", default=None)
_BACKENDS = (
    torch.backends.cuda.matmul,
    *(getattr(torch.backends.cudnn, name) for name in ("conv", "rnn")),
    *(getattr(torch.backends.mkldnn, name) for name in ("matmul", "conv", "rnn")),
)
# sums of half-precision products: partial sums would be rounded to half precision too
_REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@contextlib.contextmanager
def pinned(device: str) -> Iterator[None]:
    """No autocast, and fp32 products that are fp32: TF32 and bf16 products have 10 and 7 bits of
    mantissa, not 23.
    """
    before = [backend.fp32_precision for backend in _BACKENDS]
    matmul = torch.backends.cuda.matmul
    reductions = {name: getattr(matmul, name) for name in _REDUCTIONS}
    try:
        for backend in _BACKENDS:
            backend.fp32_precision = "ieee"
        for name in _REDUCTIONS:
            setattr(matmul, name, False)
        with without_autocast(device):
            yield
    finally:
        for backend, value in zip(_BACKENDS, before):
            backend.fp32_precision = value
        for name, value in reductions.items():
            setattr(matmul, name, value)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast turns the arguments of products into on a kind of device; None where it is
    off.
    """
    if device == "meta":
        return _ASSUMED.get()
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@contextlib.contextmanager
def assumed_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """For the time of a block, passes over shapes alone are as under autocast to `dtype`."""
    before = _ASSUMED.set(dtype)
    try:
        yield
    finally:
        _ASSUMED.reset(before)


def without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """A block without autocast."""
    return assumed_autocast(None) if device == "meta" else torch.autocast(device, enabled=False)
