"""Keyed streams: every random number of a run is a pure function of (key, step, index), so no
hidden generator state exists.

All come from ChaCha20 (`chacha20`): secret ones (noise, sampling, probes) with a secret key, public
ones (projections, rounding) with a public key. Which records of a unit a step takes comes from
AES-256, by blocks whose counters name the unit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from grape_ray.privacy import box_muller
from grape_ray.privacy.box_muller import CHUNK
from grape_ray.privacy.chacha20 import words, words_on
from grape_ray.privacy.keys import derive

STREAMS = 2  # the version of what public streams hold: 1 came from Philox
_CPU = torch.device("cpu")
_WORD = 1 << 64
_TAIL_WORDS = 1 << 63  # the words from there on refine the radii of normals
_PART = 4 * CHUNK  # numbers that a thread makes at a time, so that they stay in a core's cache


def normals(key: bytes, step: int, start: int, count: int, device: torch.device = _CPU) -> Tensor:
    """Standard normals `start .. start+count` of the stream (key, step), float64, on `device`.

    Guarantees: the value at an index is bitwise the same whatever slice it is asked for in, so any
    shard makes its own. Another device differs from it by rounding (`box_muller`).

    >>> whole = normals(bytes(32), step=3, start=0, count=10)
    >>> bool((whole[4:7] == normals(bytes(32), step=3, start=4, count=3)).all())
    True
    """
    first, count = start // CHUNK * CHUNK, max(count, 0)
    size = -(-(start + count) // CHUNK) * CHUNK - first

    def refine(low: int) -> box_muller.Refine:
        def refining(places: np.ndarray) -> np.ndarray:
            radii = [_TAIL_WORDS + low // 2 + int(place) for place in places]
            return np.array([words(key, step, radius, 1)[0] for radius in radii])

        return refining

    if device.type != "cpu":
        made = box_muller.doubles_on(words_on(key, step, first, size, device), refine(first))
        return made[start - first :][:count]
    out = np.empty(size)

    def fill(low: int, high: int) -> None:
        box_muller.doubles(
            words(key, step, first + low, high - low), refine(first + low), out[low:high]
        )

    _in_threads(fill, size)
    return torch.as_tensor(out[start - first :][:count])


def _in_threads(fill: Callable[[int, int], None], size: int) -> None:
    """Calls `fill` for parts of 0 .. size, in as many threads as torch uses; OpenSSL and NumPy run
    beside each other.
    """
    parts = [(low, min(low + _PART, size)) for low in range(0, size, _PART)]
    threads = min(torch.get_num_threads(), len(parts))
    if threads < 2:
        for part in parts:
            fill(*part)
        return
    with ThreadPoolExecutor(threads, "random") as pool:  # of the call alone: nothing to fork
        for ended in [pool.submit(fill, *part) for part in parts]:
            ended.result()


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
    key: bytes,
    label: str,
    period: int,
    shape: tuple[int, int],
    rows: slice = slice(None),
    device: torch.device = _CPU,
) -> Tensor:
    """Standard normals, float32, of a public stream: a function of (key, label, period) and of the
    place in the matrix alone; used for projections.

    Args:
        shape: of the whole matrix. rows: the part of its rows that is wanted; it costs that part.
        device: where they are made; devices differ by rounding.
    """
    start, count, whole = _rows_of(shape, rows)
    stream, first = _public_key(key, label, period), start // 2
    size = -(-(start + count) // 2) - first
    if device.type != "cpu":
        made = box_muller.singles_on(words_on(stream, 0, first, size, device))
        return made[start - 2 * first :][:count].view(whole)
    out = np.empty(2 * size, dtype=np.float32)

    def fill(low: int, high: int) -> None:
        box_muller.singles(words(stream, 0, first + low, high - low), out[2 * low : 2 * high])

    _in_threads(fill, size)
    return torch.as_tensor(out[start - 2 * first :][:count].reshape(whole))


def public_bits(
    key: bytes,
    label: str,
    step: int,
    shape: tuple[int, int],
    rows: slice = slice(None),
    device: torch.device = _CPU,
) -> Tensor:
    """16 random bits for each place of a matrix, of a public stream, as int16; used to round
    weights stochastically. Bitwise the same on all devices.

    Args:
        shape, rows, device: as of `public_normals`.
    """
    start, count, whole = _rows_of(shape, rows)
    stream, first = _public_key(key, label, step), start // 4
    size = -(-(start + count) // 4) - first
    if device.type == "cpu":
        made = torch.as_tensor(words(stream, 0, first, size).view(np.int16))
    else:
        made = words_on(stream, 0, first, size, device).view(torch.int16)
    return made[start - 4 * first :][:count].view(whole)


def _public_key(key: bytes, label: str, number: int) -> bytes:
    return hashlib.sha256(b"|".join([key, label.encode(), str(number).encode()])).digest()


def _rows_of(shape: tuple[int, int], rows: slice) -> tuple[int, int, tuple[int, int]]:
    """Of some rows of a matrix: the first place, how many places, and their shape."""
    low, high, _ = rows.indices(shape[0])
    taken = max(high - low, 0)
    return low * shape[1], taken * shape[1], (taken, shape[1])
