"""Records for pipelines at `size="tiny"`: generated, or scikit-learn's digits, written once below
the cache folder, so that nothing is downloaded and any task reads them as it reads yours.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from grape_ray.data.cache import cache_folder
from grape_ray.storage import Json
from pipelines.parts.image_files import images_table

TRAIN, VALIDATION = 512, 64
_NAMES = ("Aromi", "Zizzi", "Cotto", "Fitzbillies", "Strada", "Clowns", "Wildwood", "Loch Fyne")
_FOODS = ("Italian", "French", "Indian", "Chinese", "English", "Japanese")
_PLACES = ("by the river", "in the city centre")
_FILLERS = ("film", "plot", "scene", "cast", "song", "story", "voice", "end", "shot", "line")
# Words of which each text of a class holds one.
_TELLING = ("awful", "lovely", "dull", "sunny", "lost", "odd")


def classified(columns: Sequence[str], label: str, classes: int) -> tuple[str, str]:
    """Files of training and validation records: texts in some columns, of which the last has a word
    that tells the class, and the class's number.
    """

    def row(rng: np.random.Generator) -> Json:
        found: Json = {name: _words(rng) for name in columns}
        chosen = int(rng.integers(classes))
        found[columns[-1]] = f"{_TELLING[chosen]} {found[columns[-1]]}"
        return {**found, label: chosen}

    return _files(f"classified-{'-'.join(columns)}-{label}-{classes}", row)


def restaurants() -> tuple[str, str]:
    """The same of meanings and sentences, in the manner and with the columns of E2E."""

    def row(rng: np.random.Generator) -> Json:
        name, food, place = (words[rng.integers(len(words))] for words in (_NAMES, _FOODS, _PLACES))
        return {
            "meaning_representation": f"name[{name}], food[{food}], area[{place[3:]}]",
            "human_reference": f"{name} serves {food} food {place}.",
        }

    return _files("restaurants", row)


def questions(columns: dict[str, str], answers: str) -> tuple[str, str]:
    """The same of passages with a question and its answers.

    Args:
        columns: of `passage` and `question`, and further ones, by what they hold. answers: the
            column of a structure and, after a dot, its list of answers.
    """
    column, _, member = answers.partition(".")

    def row(rng: np.random.Generator) -> Json:
        name, food = _NAMES[rng.integers(len(_NAMES))], _FOODS[rng.integers(len(_FOODS))]
        texts = {
            "title": name,
            "passage": f"{name} serves {food} food.",
            "question": "Which food does it serve?",
        }
        return {columns[k]: v for k, v in texts.items() if k in columns} | {
            column: {member: [food]}
        }

    return _files(f"questions-{'-'.join(columns.values())}-{answers}", row)


def articles(columns: Sequence[str], words: int) -> tuple[str, str]:
    """The same of texts of so many words, in each of some columns."""
    name = f"articles-{'-'.join(columns)}-{words}"
    return _files(name, lambda rng: {column: _words(rng, words) for column in columns})


def digits() -> tuple[str, str]:
    """The same of scikit-learn's 1,797 handwritten digits, as PNG images with their labels."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels = (found.images[order] * (255 / 16)).round().astype(np.uint8)
    table = images_table(pixels, found.target[order])
    places = []
    for name, rows in (("train", table.slice(0, 1437)), ("validation", table.slice(1437))):
        file = io.BytesIO()
        pq.write_table(rows, file)
        places.append(_written(f"digits-{name}.parquet", file.getvalue()))
    return places[0], places[1]


def _words(rng: np.random.Generator, count: int = 0) -> str:
    return " ".join(rng.choice(_FILLERS, count or int(rng.integers(2, 6))))


def _files(name: str, row: Callable[[np.random.Generator], Json]) -> tuple[str, str]:
    places = []
    for part, rows, seed in (("train", TRAIN, 1), ("validation", VALIDATION, 2)):
        rng = np.random.default_rng(seed)
        lines = "".join(json.dumps(row(rng)) + "\n" for _ in range(rows))
        places.append(_written(f"{name}-{part}.jsonl", lines.encode()))
    return places[0], places[1]


def _written(name: str, content: bytes) -> str:
    """The path of a file with this content, left alone where it is there."""
    place = cache_folder().with_name("tiny") / name
    if not place.is_file() or place.read_bytes() != content:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, place)
    return str(place)
