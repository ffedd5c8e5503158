"""A task whose workers write down every noise that they draw: key, rank and step, so that a soak
can hold them against the ledger.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from grape_ray.config.schema import Config
from grape_ray.data.arrays import Records
from grape_ray.privacy.noise import NoiseStream
from tests.support.tiny import Tiny, tiny


@dataclass(frozen=True)
class Witness(Tiny):
    """Tiny, and from the first batch on each claim of a noise appends a line to the file
    `witness`.
    """

    witness: str = ""

    def collate(self, records: Records, indices: np.ndarray) -> Mapping[str, Tensor]:
        if NoiseStream.claim is _claim:
            NoiseStream.claim = _witnessed(self.witness)  # pyright: ignore[reportAttributeAccessIssue]
        return super().collate(records, indices)


_claim = NoiseStream.claim


def _witnessed(path: str):
    def claim(stream: NoiseStream, step: int) -> None:
        _claim(stream, step)
        line = json.dumps(
            {
                "key": name_of(stream._key),
                "time": time.time(),
                "rank": int(os.environ.get("RANK", "0")),
                "step": step,
                "pid": os.getpid(),
            }
        )
        with open(path, "a") as file:
            file.write(line + "\n")

    return claim


def name_of(key: bytes) -> str:
    """What a witness writes in the place of a key."""
    return hashlib.sha256(b"witness" + key).hexdigest()[:16]


def witnessed() -> Config:
    """The tiny run, to be told its length and where to write."""
    config = tiny()
    fields = {f.name: getattr(config.task, f.name) for f in dataclasses.fields(Tiny)}
    return dataclasses.replace(config, task=Witness(**{**fields, "name": "witness"}))
