"""ChaCha20 as a keyed stream of 64-bit words, bit for bit the same by OpenSSL on the CPU and by
integer operations on tensors of any device.

Source: RFC 8439, section 2.3. Counter and nonce are taken as Bernstein has them ("ChaCha, a variant
of Salsa20", 2008): a counter of 64 bits and a nonce of 64, which is the step. Word i of a stream is
bytes 8 i to 8 i + 8 of it, little end first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

WORDS = 8  # of a block, which is 64 bytes
_COUNTERS = 1 << 32  # blocks with the same upper half of the counter
_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
_DOUBLE_ROUNDS = 10


def words(key: bytes, step: int, first: int, count: int) -> np.ndarray:
    """Words `first .. first+count` of the stream of (key, step).

    Args:
        key: 32 bytes. step: in [0, 2^64). first: below 2^67 - count.

    Returns:
        `count` uint64.

    >>> bool(words(bytes(32), 0, 3, 5)[2] == words(bytes(32), 0, 5, 1)[0])
    True
    """
    skipped, end = first % WORDS, first + count
    out = np.empty(8 * (skipped + max(count, 0)), dtype=np.uint8)
    low = first - skipped
    while low < end:
        block = low // WORDS
        # what OpenSSL does beyond 32 bits of its counter is not in the RFC
        high = min(end, (block // _COUNTERS + 1) * _COUNTERS * WORDS)
        nonce = block.to_bytes(8, "little") + step.to_bytes(8, "little")
        part = out[8 * (low - first + skipped) : 8 * (high - first + skipped)]
        stream = Cipher(algorithms.ChaCha20(key, nonce), None).encryptor()
        stream.update_into(memoryview(bytes(len(part))), part.data)
        low = high
    return out.view("<u8")[skipped:]


def words_on(key: bytes, step: int, first: int, count: int, device: torch.device) -> Tensor:
    """As `words`, made on `device` by tensor operations: `count` int64 with the same bits.

    On a GPU the rounds are compiled into one kernel where torch can do that.
    """
    if device.type == "meta":  # shapes alone have no words
        return torch.empty(count, dtype=torch.int64, device=device)
    low, high = first // WORDS, -(-(first + count) // WORDS)
    fixed = b"expand 32-byte k" + key + step.to_bytes(8, "little")
    state = torch.frombuffer(bytearray(fixed), dtype=torch.int32).to(device).unbind()
    block = torch.arange(high - low, dtype=torch.int64, device=device).add_(low)
    counter = _low_half(block & (_COUNTERS - 1)), _low_half(block >> 32)
    rounds = _rounds(device) if device.type == "cuda" else blocks
    with torch.compiler.set_stance("default"):  # losses, in which projections are made, forbid it
        made = rounds(*state[:12], *counter, *state[12:])
    return made.view(torch.int64).view(-1)[first - low * WORDS :][:count]


def _low_half(values: Tensor) -> Tensor:
    """int64 below 2^32 as int32 with the same 32 bits."""
    return torch.where(values < 1 << 31, values, values - _COUNTERS).to(torch.int32)


def blocks(*state: Tensor) -> Tensor:
    """The block function (RFC 8439, section 2.3.1) of N blocks at once.

    Args:
        state: its 16 words, int32 each, (N,) of the counter and (N,) or () of the others; additions
            wrap.

    Returns:
        (N, 16) int32.
    """
    working = list(state)
    for _ in range(_DOUBLE_ROUNDS):
        for quarter in (*_COLUMNS, *_DIAGONALS):
            _quarter_round(working, *quarter)
    count = state[12].shape
    mixed = [(word + start).expand(count) for word, start in zip(working, state)]
    return torch.stack(mixed, dim=-1)


def _quarter_round(state: list[Tensor], a: int, b: int, c: int, d: int) -> None:
    state[a] = state[a] + state[b]
    state[d] = _rotated(state[d] ^ state[a], 16)
    state[c] = state[c] + state[d]
    state[b] = _rotated(state[b] ^ state[c], 12)
    state[a] = state[a] + state[b]
    state[d] = _rotated(state[d] ^ state[a], 8)
    state[c] = state[c] + state[d]
    state[b] = _rotated(state[b] ^ state[c], 7)


def _rotated(word: Tensor, left: int) -> Tensor:
    """int32 rotated to the left; a shift to the right brings copies of the sign, which are cut."""
    return (word << left) | ((word >> (32 - left)) & ((1 << left) - 1))


@cache
def _rounds(device: torch.device) -> Callable[..., Tensor]:
    """`blocks` as one kernel, if it gives the same bits; as it is where torch cannot compile it."""
    compiled: Callable[..., Tensor] = torch.compile(  # pyright: ignore[reportUnknownMemberType]
        blocks, dynamic=True
    )
    state = list(torch.arange(16, dtype=torch.int32, device=device).unbind())
    state[12] = state[13] = torch.arange(-32, 32, dtype=torch.int32, device=device)
    try:
        reason = None if torch.equal(compiled(*state), blocks(*state)) else "its bits are others"
    except Exception as error:  # without Triton, a C compiler or a cache folder, each its own error
        reason = str(error)
    if reason is None:
        return compiled
    warnings.warn(f"random numbers are made by slower kernels: {reason}", stacklevel=2)
    return blocks
