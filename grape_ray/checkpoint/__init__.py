"""Checkpoints: every rank streams its own shards to storage, and a manifest, written last, makes
them count.
"""

from grape_ray.checkpoint.coordinates import Coordinates
from grape_ray.checkpoint.manifest import (
    Manifest,
    folder_of,
    names,
    of_step,
    read_manifest,
    retain,
    step_of,
)
from grape_ray.checkpoint.reader import (
    Checkpoint,
    Reader,
    distinct,
    latest,
    load,
    pass_over,
    restore,
)
from grape_ray.checkpoint.shards import Shard, share
from grape_ray.checkpoint.writer import State, Writer

__all__ = [
    "Checkpoint", "Coordinates", "Manifest", "Reader", "Shard", "State", "Writer", "distinct",
    "folder_of", "latest", "load", "names", "of_step", "pass_over", "read_manifest", "restore",
    "retain", "share", "step_of",
]  # fmt: skip
