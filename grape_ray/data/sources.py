"""Where records come from: files of any format, folders that Hugging Face `datasets` wrote, folders
of images, datasets on the hub; all read as Arrow batches.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from grape_ray.data.files import file_system, found_files
from grape_ray.data.readers import batches_of, check_columns, format_of, named_format
from grape_ray.errors import DataError, nearest

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # as `save_to_disk` writes them


@dataclass(frozen=True)
class Source:
    """One split of a dataset.

    Attributes:
        place: a file, folder, pattern with `*` or URL (`hf://datasets/...`, `s3://...`), or the
            name of a dataset on the hub.
        config, split: of a dataset on the hub, or of a folder that holds several splits.
        format: of files, where the ends of their names do not say it: see `readers.FORMATS`.
    """

    place: str
    config: str = ""
    split: str = "train"
    format: str = ""

    def other(self, named: str) -> Source:
        """Another split: `named` is a split of this dataset, or a place of its own."""
        splits = self._is_hub() or self._has(_SAVED_SPLITS)
        if splits and "/" not in named and not Path(named).exists():
            return replace(self, split=named)
        return replace(self, place=named, split="train")

    def identity(self) -> list[str]:
        """What changes when the content does: the files and what their file system says of each
        (size, time, checksum), or the revision on the hub. No file is read.

        Raises:
            DataError: nothing there.
        """
        if self._is_hub():
            builder = _hub(self, None)
            return ["hub", str(builder.cache_dir), self.split]
        if self._has(_SAVED) or self._has(_SAVED_SPLITS):
            fs, files = found_files(self.place, (".arrow", ".json"))
        elif self.holds_images():
            fs, files = found_files(self.place, (*_IMAGES, ".csv", ".jsonl"))
        else:
            fs, files = found_files(self.place)
        marks = [[file, str(fs.ukey(file))] for file in files]
        digest = hashlib.sha256(json.dumps(marks).encode()).hexdigest()
        return [self.config, self.split, self.format, digest]

    def batches(
        self, columns: Sequence[str] | None, texts: Sequence[str] = ()
    ) -> Iterator[Iterator[pa.RecordBatch]]:
        """The records, as batches of each file in turn.

        Args:
            columns: those that are wanted; None is all. texts: see `readers.batches_of`.

        Raises:
            DataError: nothing there, unreadable, or a column is missing.
        """
        dataset = self._dataset()
        if dataset is not None:
            names = list(dataset.column_names)
            check_columns(self.place, names, columns or ())
            wanted = names if columns is None else list(columns)
            yield _batches_of_dataset(dataset.select_columns(wanted))
            return
        fs, files = found_files(self.place)
        for file in files:
            yield batches_of(fs, file, format_of(file, self.format), columns, texts)

    def class_names(self) -> dict[str, tuple[str, ...]]:
        """The names of the classes of each column, or of those in its lists, where the dataset
        itself says them.
        """
        dataset = self._dataset()
        features = {} if dataset is None else dataset.features
        inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
        return {name: tuple(f.names) for name, f in inner.items() if getattr(f, "names", None)}

    def label_names(self, column: str) -> tuple[str, ...]:
        """The names of one column's classes; none where the dataset does not say them."""
        return self.class_names().get(column, ())

    def holds_images(self) -> bool:
        """Whether it is a folder of image files, the class of each the folder that it lies in."""
        if self.format or not os.path.isdir(self.place):
            return False
        return any(
            file.lower().endswith(_IMAGES) for _, _, files in os.walk(self.place) for file in files
        )

    def _has(self, file: str) -> bool:
        try:
            fs, path = file_system(self.place)
            return bool(fs.exists(f"{path.rstrip('/')}/{file}"))
        except Exception:  # nothing that can be reached: told by `found_files`
            return False

    def _is_hub(self) -> bool:
        """Whether the place can only be a dataset's name on the hub: `owner/name` or, with a
        configuration, `name`.
        """
        place = self.place
        if self.format or not place or "://" in place or "*" in place or Path(place).exists():
            return False
        plain = all(part and not part.startswith((".", "~")) for part in place.split("/"))
        named = plain and not named_format(place)
        return named and (place.count("/") == 1 or bool(self.config))

    def _dataset(self) -> Any:
        """The split as a Hugging Face dataset, where it is one; None for plain files."""
        if self._is_hub():
            return _hub(self, self.split)
        if self._has(_SAVED_SPLITS):
            found = _saved(self.place)
            if self.split not in found:
                raise DataError(
                    f"the folder {self.place} has no split", self.split, "one of its own",
                    nearest(self.split, [str(name) for name in found]),
                )  # fmt: skip
            return found[self.split]
        if self._has(_SAVED):
            return _saved(self.place)
        if self.holds_images():
            return _image_folder(self.place)
        return None


def _saved(place: str) -> Any:
    """What `save_to_disk` wrote."""
    import datasets  # takes a second, and plain files need none of it

    datasets.disable_progress_bars()
    return datasets.load_from_disk(place)


def _hub(source: Source, split: str | None) -> Any:
    """A dataset on the hub: its split, or, for None, its builder, which knows its revision."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if split is None:
            return datasets.load_dataset_builder(source.place, source.config or None)
        return datasets.load_dataset(source.place, source.config or None, split=split)
    except Exception as error:  # of the network, the hub, or the dataset's own files
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise DataError(
            "data not found",
            source.place,
            "a file, folder, pattern or URL that exists, or the name of a dataset on the hub",
            f"check the path, or that the hub can be reached ({reason})",
        ) from None


def _image_folder(place: str) -> Any:
    """An image folder as a dataset with the columns `image` (encoded bytes) and `label`."""
    import datasets

    classes = sorted(entry.name for entry in os.scandir(place) if entry.is_dir())
    rows = [
        (str(file), classes.index(name))
        for name in classes
        for file in sorted(Path(place, name).rglob("*"))
        if file.name.lower().endswith(_IMAGES)
    ]
    if not rows:
        raise DataError(
            f"the images of {place} have no classes",
            "no folders",
            "one folder a class, named as the class",
            "move each class's images into a folder of its own",
        )
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=classes)}
    )
    columns = {"image": [file for file, _ in rows], "label": [label for _, label in rows]}
    return datasets.Dataset.from_dict(columns, features)


def _batches_of_dataset(dataset: Any) -> Iterator[pa.RecordBatch]:
    """A Hugging Face dataset's rows; images as encoded bytes, read where only a path is kept."""
    for table in dataset.with_format("arrow").iter(batch_size=1024):
        for column in table.column_names:
            kind = table.schema.field(column).type
            if pa.types.is_struct(kind) and {"bytes", "path"} <= {f.name for f in kind}:
                table = _with_bytes(table, column)
        yield from table.combine_chunks().to_batches()


def _with_bytes(table: pa.Table, column: str) -> pa.Table:
    """The table, its images (encoded bytes, or the path of a file) all as encoded bytes."""
    images = [
        None if image is None else image["bytes"] or Path(image["path"]).read_bytes()
        for image in table[column].to_pylist()
    ]
    place = table.column_names.index(column)
    return table.set_column(place, column, pa.array(images, pa.large_binary()))
