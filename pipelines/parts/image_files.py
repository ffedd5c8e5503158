"""Arrays of images as the Parquet tables that `task.data` takes.

`python -m pipelines.parts.image_files FOLDER OUT` writes `OUT/train.parquet` and
`OUT/validation.parquet` with the columns `image` and `label`. FOLDER holds the four gzipped idx
files of MNIST as it is published; or PNG files whose rows are colour images, one after the other,
and `labels.npz` with the arrays `train` and `test`.
"""

from __future__ import annotations

import gzip
import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grape_ray.errors import DataError
from grape_ray.models.extras import needed


def images_table(images: np.ndarray, labels: np.ndarray) -> pa.Table:
    """A table with the columns `image` (PNG) and `label`.

    Args:
        images: uint8 (N, H, W), grays, or (N, H, W, 3). labels: integers (N,).
    """
    image = _pillow()

    def png(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    encoded = pa.array([png(pixels) for pixels in images], pa.binary())
    return pa.table({"image": encoded, "label": labels.astype(np.int64)})


def read_images(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of `train` and `validation`.

    Raises:
        DataError: the folder holds neither kind of files.
    """
    if (folder / "train-images-idx3-ubyte.gz").is_file():
        return {
            part: (
                _idx(folder / f"{name}-images-idx3-ubyte.gz"),
                _idx(folder / f"{name}-labels-idx1-ubyte.gz"),
            )
            for part, name in (("train", "train"), ("validation", "t10k"))
        }
    if not (folder / "labels.npz").is_file():
        expected = "train-images-idx3-ubyte.gz and the like, or PNG files with labels.npz"
        raise DataError("a folder of images", str(folder), expected, "check the path")
    image, labels = _pillow(), np.load(folder / "labels.npz")
    strips = [np.asarray(image.open(file)).ravel() for file in sorted(folder.glob("*.png"))]
    train, count = len(labels["train"]), len(labels["train"]) + len(labels["test"])
    pixels = np.concatenate(strips)
    side = math.isqrt(len(pixels) // (3 * count))
    if side * side * 3 * count != len(pixels):
        got = f"{len(pixels)} bytes for {count} labels"
        raise DataError(
            "the images of a folder", got, "a square colour image a label", "count them"
        )
    found = pixels.reshape(count, side, side, 3)
    return {
        "train": (found[:train], labels["train"]),
        "validation": (found[train:], labels["test"]),
    }


def _idx(place: Path) -> np.ndarray:
    """The array of a gzipped idx file of bytes."""
    content = gzip.decompress(place.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, 4).astype(int)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _pillow() -> Any:
    needed("PIL", "a dataset of images", "images")
    from PIL import Image

    return Image


def main(folder: str, out: str) -> None:
    """Writes the tables of a folder."""
    Path(out).mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in read_images(Path(folder)).items():
        place = Path(out, f"{part}.parquet")
        pq.write_table(images_table(images, labels), place)
        print(f"{place}: {len(images)} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
