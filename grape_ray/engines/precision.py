"""The precision that the proof assumes for norms, factors and sums, whatever autocast or TF32 says
outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

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
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for backend, value in zip(_BACKENDS, before):
            backend.fp32_precision = value
        for name, value in reductions.items():
            setattr(matmul, name, value)
