"""Images: encoded files as pixels in memory, and random views of them."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grape_ray.data.columns import Table

if TYPE_CHECKING:
    from PIL import Image

_AT_ONCE = 256  # images in memory while a table is looked at


def decoded(files: Sequence[bytes]) -> list[Image.Image]:
    """The images (PIL) of encoded files, turned as their EXIF says, in RGB: one of grays has three
    equal channels.

    Raises:
        OSError, and others: a file that is no whole image.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding leaves Python's lock
        return list(pool.map(_image, files))


def check_images(table: Table, column: str, size: tuple[int, int] | None) -> None:
    """Refuses rows whose image cannot be decoded, or is not of a size.

    Args:
        size: width and height of all images; None takes any.

    Raises:
        DataError: with the rows' numbers.
    """
    unreadable, others = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(table), _AT_ONCE):
            files = table.slice(start, _AT_ONCE).binary(column)
            for row, found in enumerate(pool.map(size_of, files), start):
                if found is None:
                    unreadable.append(row)
                elif size is not None and found != size:
                    others.append(row)
    fix = "save them again, or leave those rows out"
    table.refuse_rows("an unreadable image", np.array(unreadable), "whole image files", fix)
    if others and size is not None:
        fix = "resize them, or use a model whose image processor does"
        expected = f"{size[0]} x {size[1]} pixels, as the first one has"
        table.refuse_rows("an image of another size", np.array(others), expected, fix)


def size_of(file: bytes) -> tuple[int, int] | None:
    """Width and height of an encoded image; None where it cannot be decoded."""
    try:
        return _image(file).size
    except Exception:  # of any decoder; its text may say what is in the file
        return None


def random_views(pixels: Tensor, count: int, padding: float, flip: bool) -> Tensor:
    """Views of images, one image's after the other's, drawn from torch's generator: reflected
    beyond the border, cut at a random place, and mirrored or not.

    Args:
        pixels: (B, C, H, W). count: K views of each. padding: share of a side that is added at
            either end, below 1; 0 cuts nothing. flip: whether every other one, on average, is
            mirrored.

    Returns:
        (B * K, C, H, W); each view is a function of its own image and of draws that are its own.
    """
    rows, (height, width) = len(pixels) * count, pixels.shape[-2:]
    high, wide = int(height * padding), int(width * padding)
    padded = F.pad(pixels, (wide, wide, high, high), mode="reflect") if high or wide else pixels
    top = torch.randint(0, 2 * high + 1, (rows, 1)) + torch.arange(height)
    left = torch.randint(0, 2 * wide + 1, (rows, 1)) + torch.arange(width)
    if flip:
        left = torch.where(torch.rand(rows, 1) < 0.5, left.flip(1), left)
    images = torch.arange(len(pixels)).repeat_interleave(count)
    taken = padded[images[:, None, None], :, top[:, :, None], left[:, None, :]]
    return taken.permute(0, 3, 1, 2).contiguous()


def _image(file: bytes) -> Image.Image:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(file)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")
