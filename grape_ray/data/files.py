"""Which files a path, a folder, a pattern or a URL stands for."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from typing import Any, cast

import fsspec

from grape_ray.data.readers import ENDINGS
from grape_ray.errors import DataError

_EXPECTED = (
    "a file of records (CSV, JSON Lines, Parquet, Arrow, plain text), a folder or pattern with"
    " some, a URL, or a dataset on the Hugging Face hub"
)
_WEB = ("http://", "https://")
# As files of one dataset are called on the Hugging Face hub and elsewhere.
_SPLITS = {
    "train": "training", "training": "training", "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "validation", "heldout": "validation", "holdout": "validation",
}  # fmt: skip


def found_files(url: str, endings: Sequence[str] = tuple(ENDINGS)) -> tuple[Any, list[str]]:
    """The file system of a location, and the files there, sorted.

    What lies there under that very name is meant, whatever characters are in it; only where nothing
    does is a name with `*` a pattern.

    Args:
        endings: of the names of those files in a folder that are meant.

    Raises:
        DataError: nothing there, out of reach, or a folder with files of several splits, which are
            not one dataset.
    """
    if not url:
        raise DataError("data has no path", url, _EXPECTED, "name the file")
    try:
        fs, path = file_system(url)
        files, folder = _files(fs, path, endings)
    except Exception as error:  # a driver may raise anything
        fix = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DataError("data cannot be reached", url, _EXPECTED, fix) from error
    if not files:
        raise DataError("data not found", url, _EXPECTED, "check the path")
    if folder:
        _check_one_split(url, [file[len(path.rstrip("/")) + 1 :] for file in files])
    return fs, files


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a location, and its path there."""
    # What is encoded stays as it is: a signature is over the very address.
    options = {"encoded": True} if url.startswith(_WEB) and "%" in url else {}
    return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **options))


def _files(fs: Any, path: str, endings: Sequence[str]) -> tuple[list[str], bool]:
    """The files, and whether they were all that a folder holds."""
    # its folders are pages of links, and `*` and `?` are parts of addresses
    if path.startswith(_WEB):
        return ([path] if fs.exists(path) else []), False
    if fs.isdir(path):
        found = (file for file in fs.find(path) if file.lower().endswith(tuple(endings)))
        return sorted(found), True
    if fs.exists(path):
        return [path], False
    return (
        sorted(file for file in fs.glob(path) if not fs.isdir(file)) if "*" in path else []
    ), False


def _check_one_split(url: str, names: Sequence[str]) -> None:
    """Refuses a folder of which some files are for training and others to look at the result.
    Raises DataError.
    """
    splits: dict[str, str] = {}
    for name in names:
        split = _split(name)
        if split:
            splits.setdefault(split, name)
    if len(splits) > 1:
        pattern = re.sub(r"\d+", "*", next(iter(splits.values())))
        got = ", ".join(f"{split}: {name}" for split, name in splits.items())
        fix = (
            "name one of them, or a pattern such as"
            f" {posixpath.join(url, re.sub(r'[*].*[*]', '*', pattern))}"
        )
        raise DataError(f"the folder {url} holds several splits", got, "files of one", fix)


def _split(name: str) -> str | None:
    """What a file is for, by the first word of its name, or else of the folders it lies in, that
    says so.
    """
    for part in reversed(name.split("/")):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None
