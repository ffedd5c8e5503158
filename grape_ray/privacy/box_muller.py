"""Standard normals from random words by Box and Muller (1958), in float64 for noise and in float32
for projections, on the CPU by NumPy and on other devices by torch.

Angle and its functions come from the tangent of its half: cos = 2 / (1 + t^2) - 1 and sin = 2 t /
(1 + t^2), one fast function for two. NumPy and torch round logarithm and tangent differently, so a
normal's last bits depend on the device; the words never do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# numbers made together in float64: of so many words the first half gives radii, the second angles
CHUNK = 16384
TAIL = 2.0**-20  # uniforms below it are refined by another word
_MANTISSA, _ONE = (1 << 52) - 1, 0x3FF << 52

Refine = Callable[[np.ndarray], np.ndarray]  # places of the radii (n,) -> a word for each, uint64


def doubles(words: np.ndarray, refine: Refine, out: np.ndarray) -> None:
    """Standard normals in float64, one from each word, from uniforms of 52 bits, or 116 where the
    radius is large: |z| reaches 12.68, beyond which a normal lies with probability 1e-36.

    Args:
        words: (n * CHUNK,) uint64, spent. refine: the words that refine radii, by their places in
            `words` of chunks that hold CHUNK / 2 of them. out: (n * CHUNK,) float64.
    """
    words >>= np.uint64(12)
    words |= np.uint64(_ONE)  # the mantissa of a double in [1, 2)
    unit = words.view(np.float64).reshape(-1, 2, CHUNK // 2)
    made = out.reshape(unit.shape)
    radius, half = unit[:, 0], unit[:, 1]
    np.subtract(2.0, radius, out=radius)  # (0, 1]: its logarithm is finite
    tail = np.flatnonzero(radius < TAIL)
    if len(tail):
        radius[np.divmod(tail, CHUNK // 2)] = _refined(radius.reshape(-1)[tail], refine(tail))
    np.log(radius, out=radius)
    np.sqrt(np.multiply(radius, -2.0, out=radius), out=radius)
    half -= 1.0
    tangent = np.tan(np.multiply(half, np.pi, out=half), out=half)
    sine, cosine = made[:, 0], made[:, 1]
    share = np.multiply(tangent, tangent, out=cosine)
    share += 1.0
    np.divide(2.0, share, out=share)
    np.multiply(tangent, share, out=sine)
    sine *= radius
    share -= 1.0
    share *= radius


def doubles_on(words: Tensor, refine: Refine) -> Tensor:
    """As `doubles`, by torch on the device of `words` (n * CHUNK,) int64."""
    bits = (words >> 12).bitwise_and_(_MANTISSA).bitwise_or_(_ONE)
    radius, half = bits.view(torch.float64).view(-1, 2, CHUNK // 2).unbind(1)
    radius = 2.0 - radius
    tail = (radius < TAIL).view(-1).nonzero()[:, 0]
    if len(tail):
        flat, more = radius.view(-1), refine(tail.cpu().numpy())
        refined = _refined(flat[tail].cpu().numpy(), more)
        flat[tail] = torch.as_tensor(refined).to(words.device)
    radius = radius.log_().mul_(-2.0).sqrt_()
    tangent = (half - 1.0).mul_(math.pi).tan_()
    share = (tangent * tangent).add_(1.0).reciprocal_().mul_(2.0)
    made = torch.stack([tangent.mul_(share).mul_(radius), share.sub_(1.0).mul_(radius)], dim=1)
    return made.view(-1)


def _refined(uniform: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Uniforms in (0, 1] of 52 bits with 64 more below them."""
    return np.maximum(uniform - words.astype(np.float64) * 2.0**-116, 2.0**-116)


def singles(words: np.ndarray, out: np.ndarray) -> None:
    """Standard normals in float32, two from each word, from uniforms of 32 bits; |z| reaches 6.66.

    Args:
        words: (n,) uint64. out: (2 n,) float32.
    """
    low, high = words.view("<u4").reshape(-1, 2).T
    radius = low.astype(np.float32)
    radius += 1.0
    radius *= 2.0**-32  # (0, 1]
    np.log(radius, out=radius)
    np.sqrt(np.multiply(radius, -2.0, out=radius), out=radius)
    tangent = high.astype(np.float32)
    tangent *= math.pi * 2.0**-32
    np.tan(tangent, out=tangent)
    share = tangent * tangent
    share += 1.0
    np.divide(2.0, share, out=share)
    pairs = out.reshape(-1, 2)
    tangent *= share
    np.multiply(tangent, radius, out=pairs[:, 0])
    share -= 1.0
    np.multiply(share, radius, out=pairs[:, 1])


def singles_on(words: Tensor) -> Tensor:
    """As `singles`, by torch on the device of `words` (n,) int64."""
    radius = (words & 0xFFFFFFFF).float().add_(1.0).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    tangent = ((words >> 32) & 0xFFFFFFFF).float().mul_(math.pi * 2.0**-32).tan_()
    share = (tangent * tangent).add_(1.0).reciprocal_().mul_(2.0)
    return torch.stack(
        [tangent.mul_(share).mul_(radius), share.sub_(1.0).mul_(radius)], dim=1
    ).view(-1)
