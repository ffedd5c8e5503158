"""Keyed streams: every random number of a run is a pure function of (key, step, index), so no hidden generator state exists.

Secret streams (noise, sampling, probes) come from AES-256 in counter mode; public ones (projections) from Philox.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_CHUNK = 8192  # normals made at a time; fixed, so that a value does not depend on the slice it was asked for in
_WORD = 1 << 64


def words(key: bytes, step: int, first: int, count: int) -> np.ndarray:
    """Words `first .. first+count` of the AES-256-CTR stream of (key, step).

    Args:
        key: 32 secret bytes. step: in [0, 2^64), the upper half of the counter block. first: index of the first word, even.

    Returns:
        `count` uint64.
    """
    block = step.to_bytes(8, "big") + (first // 2).to_bytes(8, "big")
    stream = Cipher(algorithms.AES256(key), modes.CTR(block)).encryptor()
    return np.frombuffer(stream.update(bytes(16 * ((count + 1) // 2))), dtype="<u8")[:count]


def _chunk_of_normals(key: bytes, step: int, chunk: int) -> np.ndarray:
    """Standard normals `chunk*_CHUNK ..` by Box-Muller in float64; both uniforms carry 53 bits."""
    raw = words(key, step, chunk * _CHUNK, _CHUNK)
    unit = 2.0**-53
    radius = np.sqrt(-2.0 * np.log(((raw[0::2] >> np.uint64(11)) + np.uint64(1)) * unit))
    angle = (raw[1::2] >> np.uint64(11)) * (2.0 * np.pi * unit)
    out = np.empty(_CHUNK)
    np.multiply(radius, np.cos(angle), out=out[0::2])
    np.multiply(radius, np.sin(angle), out=out[1::2])
    return out


def normals(key: bytes, step: int, start: int, count: int, threads: int = 1) -> np.ndarray:
    """Standard normals `start .. start+count` of the stream (key, step), float64.

    Guarantees: the value at an index is bitwise the same whatever slice it is asked for in, so any shard makes its own.
    """
    if count <= 0:
        return np.empty(0)
    first, last = start // _CHUNK, (start + count - 1) // _CHUNK
    out = np.empty(count)

    def fill(chunk: int) -> None:
        low, high = max(start, chunk * _CHUNK), min(start + count, (chunk + 1) * _CHUNK)
        out[low - start : high - start] = _chunk_of_normals(key, step, chunk)[low - chunk * _CHUNK : high - chunk * _CHUNK]

    if threads > 1 and last > first:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(first, last + 1)))
    else:
        for chunk in range(first, last + 1):
            fill(chunk)
    return out


def poisson_batch(key: bytes, step: int, size: int, sampling_prob: float) -> np.ndarray:
    """Indices of the Poisson batch of a step, ascending, int64.

    Record i is in the batch iff its own word of the stream is below floor(q * 2^64): independent across records and steps, never
    above q, and the same on every worker; a worker takes the share batch[rank::world_size].
    """
    threshold = int(Fraction(sampling_prob) * _WORD)
    if threshold >= _WORD:
        return np.arange(size, dtype=np.int64)
    return np.flatnonzero(words(key, step, 0, size) < np.uint64(threshold)).astype(np.int64)


def public_normals(key: bytes, label: str, period: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normals, float32, of a public stream: a function of (key, label, period) alone; used for projections."""
    digest = hashlib.sha256(b"|".join([key, label.encode(), str(period).encode()])).digest()
    philox = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
    return np.random.Generator(philox).standard_normal(shape, dtype=np.float32)
