"""Keyed streams: every random number of a run is a pure function of (key, step, index), so no
hidden generator state exists.

Secret streams (noise, sampling, probes) come from AES-256 in counter mode; public ones
(projections) from Philox.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from grape_ray.privacy.keys import derive

# normals made at a time; fixed, so that a value does not depend on the slice it was asked for in
_CHUNK = 16384
_WORD = 1 << 64
_TAIL, _TAIL_WORDS = 2.0**-20, 1 << 63  # uniforms below it are refined, by words from there on
_BLOCK_ROWS = 1024  # rows of a public matrix made at a time


def words(key: bytes, step: int, first: int, count: int) -> np.ndarray:
    """Words `first .. first+count` of the AES-256-CTR stream of (key, step).

    Args:
        key: 32 secret bytes. step: in [0, 2^64), the upper half of the counter block. first: index
            of the first word, even.

    Returns:
        `count` uint64.
    """
    # a block of AES is two words
    block = step.to_bytes(8, "big") + (first // 2).to_bytes(8, "big")
    stream = Cipher(algorithms.AES256(key), modes.CTR(block)).encryptor()
    return np.frombuffer(stream.update(bytes(16 * ((count + 1) // 2))), dtype="<u8")[:count]


def _chunk_of_normals(key: bytes, step: int, chunk: int) -> np.ndarray:
    """Standard normals `chunk*_CHUNK ..` by Box-Muller in float64, from two uniforms of 52 bits, or
    116 where the radius is large.

    |z| reaches 12.68, beyond which a normal lies with probability 1e-36.

    The angle's cosine and sine come from the tangent of its half, 2 / (1 + t^2) - 1 and 2 t / (1 +
    t^2): one fast function for two.
    """
    bits = words(key, step, chunk * _CHUNK, _CHUNK) >> np.uint64(12)
    bits |= np.uint64(0x3FF0000000000000)  # the mantissa of a double in [1, 2)
    unit, half = bits.view(np.float64)[: _CHUNK // 2], bits.view(np.float64)[_CHUNK // 2 :]
    radius = np.subtract(2.0, unit, out=unit)  # (0, 1]: its logarithm is finite
    _refine(radius, key, step, chunk)
    np.log(radius, out=radius)
    np.sqrt(np.multiply(radius, -2.0, out=radius), out=radius)
    half -= 1.0
    tangent = np.tan(np.multiply(half, np.pi, out=half), out=half)
    share = tangent * tangent
    share += 1.0
    np.divide(2.0, share, out=share)
    out = np.empty(_CHUNK)
    sine, cosine = out[: _CHUNK // 2], out[_CHUNK // 2 :]
    np.multiply(tangent, share, out=sine)
    sine *= radius
    np.subtract(share, 1.0, out=cosine)
    cosine *= radius
    return out


def _refine(uniform: np.ndarray, key: bytes, step: int, chunk: int) -> None:
    """Gives the uniforms in (0, 1] of 52 bits that are below 2^-20, the normals' tails, 64 bits
    more from words of their own.
    """
    for place in np.flatnonzero(uniform < _TAIL):
        more = words(key, step, _TAIL_WORDS + 2 * (chunk * _CHUNK + int(place)), 1)[0]
        uniform[place] = max(uniform[place] - float(more) * 2.0**-116, 2.0**-116)


def normals(key: bytes, step: int, start: int, count: int) -> np.ndarray:
    """Standard normals `start .. start+count` of the stream (key, step), float64.

    Guarantees: the value at an index is bitwise the same whatever slice it is asked for in, so any
    shard makes its own.

    >>> whole = normals(bytes(32), step=3, start=0, count=10)
    >>> (whole[4:7] == normals(bytes(32), step=3, start=4, count=3)).all()
    np.True_
    """
    out = np.empty(max(count, 0))
    for chunk in range(start // _CHUNK, -(-(start + count) // _CHUNK)):
        first = chunk * _CHUNK
        low, high = max(start, first), min(start + count, first + _CHUNK)
        out[low - start : high - start] = _chunk_of_normals(key, step, chunk)[
            low - first : high - first
        ]
    return out


def poisson_batch(key: bytes, step: int, size: int, sampling_prob: float) -> np.ndarray:
    """Indices of the Poisson batch of a step, ascending, int64.

    Record i is in the batch iff its own word of the stream is below floor(q * 2^64): independent
    across records and steps, never above q, and the same on every worker; a worker takes the share
    batch[rank::world_size].
    """
    threshold = int(Fraction(sampling_prob) * _WORD)
    # 2^64, for a q of 1, is no uint64
    if threshold >= _WORD:
        return np.arange(size, dtype=np.int64)
    return np.flatnonzero(words(key, step, 0, size) < np.uint64(threshold)).astype(np.int64)


def picks_within_units(
    key: bytes, step: int, units: np.ndarray, sizes: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which records of the units in a step's batch the step takes: all of a unit that has at most
    `most`, else `most` of them, without replacement, each set of so many with the same probability.

    A function of (key, unit, step) and of the unit's size alone, whatever other units are asked
    for, so that every rank picks the same.

    Args:
        key: 32 secret bytes, those of `poisson_batch`; a key of its own is derived from it.
        units: (L,) numbers below 2^32. sizes: (L,) how many records each has. most: 1 to 2^24.

    Returns:
        The records' places within their units, ascending in each and one unit after the other; and
        how many each has, (L,).

    Source of the sampling: R. Floyd in Bentley, "Programming Pearls: A sample of brilliance", 1987.
    """
    counts, width = np.minimum(sizes, most), min(most, int(sizes.max(initial=0)))
    table = np.tile(np.arange(width, dtype=np.int64), (len(units), 1))
    large = np.flatnonzero(sizes > most)
    own = derive(key, "records of a unit") if len(large) else b""
    for draw in range(width if len(large) else 0):
        last = sizes[large] - most + draw
        place = _below(own, step, units[large], draw, last + 1)
        taken = (table[large, :draw] == place[:, None]).any(1)
        table[large, draw] = np.where(taken, last, place)
    table[large] = np.sort(table[large], axis=1)
    return table[np.arange(width) < counts[:, None]], counts


def _below(key: bytes, step: int, units: np.ndarray, draw: int, bounds: np.ndarray) -> np.ndarray:
    """A uniform integer in [0, bound) for each unit, int64: the first word of its own whose
    remainder favours no value.

    The word of (unit, draw, attempt) is the first of the block of AES-256 whose counter is (step,
    unit, draw, attempt), of 64, 32, 24 and 8 bits.
    """
    cipher, found = Cipher(algorithms.AES256(key), modes.ECB()), np.zeros(len(units), np.int64)
    sizes, open_ = bounds.astype(np.uint64), np.arange(len(units))
    for attempt in range(1 << 8):  # one fails once in 2^32 at most, so a second is rare
        counter = (units[open_].astype(np.uint64) << np.uint64(32)) + np.uint64(
            (draw << 8) + attempt
        )
        blocks = np.empty((len(open_), 2), dtype=">u8")
        blocks[:, 0], blocks[:, 1] = step, counter
        stream = cipher.encryptor().update(blocks.tobytes())
        word = np.frombuffer(stream, dtype="<u8")[::2]
        size = sizes[open_]
        # the largest multiple of `size` in 2^64 words is 2^64 - (2^64 mod size)
        fair = word <= ~((np.uint64(0) - size) % size)
        found[open_[fair]] = (word % size)[fair].astype(np.int64)
        open_ = open_[~fair]
        if not len(open_):
            break
    return found


def public_normals(
    key: bytes, label: str, period: int, shape: tuple[int, int], rows: slice = slice(None)
) -> np.ndarray:
    """Standard normals, float32, of a public stream: a function of (key, label, period) alone; used
    for projections.

    Args:
        shape: of the whole matrix. rows: the part of its rows that is wanted; it costs little more
            than that part.
    """
    return _by_blocks(
        key,
        label,
        period,
        shape,
        rows,
        lambda stream, size: stream.standard_normal(size, dtype=np.float32),
    )


def public_bits(
    key: bytes, label: str, step: int, shape: tuple[int, int], rows: slice = slice(None)
) -> np.ndarray:
    """Uniform uint16 of a public stream, in rows like `public_normals`; used to round weights
    stochastically.
    """
    return _by_blocks(
        key,
        label,
        step,
        shape,
        rows,
        lambda stream, size: stream.integers(0, 1 << 16, size, dtype=np.uint16),
    )


def _by_blocks(
    key: bytes,
    label: str,
    number: int,
    shape: tuple[int, int],
    rows: slice,
    draw: Callable[[np.random.Generator, tuple[int, int]], np.ndarray],
) -> np.ndarray:
    """Rows of a matrix of random numbers, each block of rows from a Philox stream of its own."""
    start, stop, _ = rows.indices(shape[0])
    # an empty part, so that no rows have a type, too
    parts = [draw(np.random.default_rng(0), (0, shape[1]))]
    for block in range(start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS)):
        first = block * _BLOCK_ROWS
        digest = hashlib.sha256(
            b"|".join([key, label.encode(), str(number).encode(), str(block).encode()])
        ).digest()
        # a stream of its own for each block, so that a rank makes its rows without the rows before
        stream = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")))
        parts.append(
            draw(stream, (min(_BLOCK_ROWS, shape[0] - first), shape[1]))[
                max(start - first, 0) : max(stop - first, 0)
            ]
        )
    return np.concatenate(parts)
