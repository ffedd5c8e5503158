"""Shards: the rows of a tensor that a rank holds, and the safetensors files that they are streamed
into and read from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grape_ray.errors import CheckpointError
from grape_ray.storage import Block, Json, Storage

_BLOCK_BYTES = 8 << 20
_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """Rows `start .. start + len(tensor)` of dimension 0 of a tensor of `global_shape`; a tensor
    without dimensions is one shard.
    """

    tensor: Tensor
    global_shape: tuple[int, ...]
    start: int = 0

    @classmethod
    def whole(cls, tensor: Tensor) -> Shard:
        """The shard that is the tensor."""
        return cls(tensor, tuple(tensor.shape))


@dataclass(frozen=True)
class Piece:
    """Where a shard lies in storage, as the manifest says it.

    Attributes:
        file: below the checkpoint's folder. offset, bytes: its place in the file. sha256: of these
            bytes.
        name: of its tensor. start, rows: what it holds of dimension 0 of `global_shape`; both 0 for
            a tensor without dimensions.
        dtype: as safetensors names it.
    """

    name: str
    file: str
    offset: int
    bytes: int
    sha256: str
    dtype: str
    global_shape: tuple[int, ...]
    start: int
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        return (self.rows, *self.global_shape[1:]) if self.global_shape else ()

    @classmethod
    def from_json(cls, fields: Json) -> Piece:
        """The piece of a manifest's entry."""
        return cls(**{**fields, "global_shape": tuple(fields["global_shape"])})


def share(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Shard]:
    """What one rank of a replicated state writes, so that all ranks together write each byte once
    and about the same number of bytes.

    Tensors of more than a rank's part are cut by rows; the others go, the largest first, to the
    rank that has least so far.
    """
    total = sum(_size(t) for t in tensors.values())
    taken, mine = [0] * world_size, {}
    # every rank must come to the same order, ties included
    for name, tensor in sorted(tensors.items(), key=lambda item: (-_size(item[1]), item[0])):
        if (
            world_size > 1
            and tensor.ndim
            and len(tensor) >= world_size
            and _size(tensor) * world_size > total
        ):
            low, high = (len(tensor) * r // world_size for r in (rank, rank + 1))
            mine[name] = Shard(tensor[low:high], tuple(tensor.shape), low)
            taken = [t + _size(tensor) // world_size for t in taken]
        else:
            least = taken.index(min(taken))
            taken[least] += _size(tensor)
            if least == rank:
                mine[name] = Shard.whole(tensor)
    return mine


def snapshot(shards: Mapping[str, Shard]) -> dict[str, Shard]:
    """The shards as they are now, copied to host memory."""
    return {
        # a copy of what lies in host memory as well: training goes on in it
        n: Shard(s.tensor.detach().to("cpu", copy=True).contiguous(), s.global_shape, s.start)
        for n, s in shards.items()
    }


def write(
    storage: Storage, folder: str, file: str, shards: Mapping[str, Shard]
) -> tuple[int, list[Piece]]:
    """Streams shards in host memory as one safetensors file; returns its bytes and its pieces.

    The header holds each shard's own shape, so that any reader of safetensors opens the file;
    nothing is copied but a block at a time.
    """
    header, pieces = _header(file, shards)
    digests = {name: hashlib.sha256() for name in shards}

    def blocks() -> Iterator[Block]:
        yield header
        for name, shard in shards.items():
            # anew: a try that broke off has fed the one before
            digests[name] = hashlib.sha256()
            view = shard.tensor.reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(view), _BLOCK_BYTES):
                block = view[start : start + _BLOCK_BYTES]
                digests[name].update(block)
                yield block

    storage.upload(f"{folder}/{file}", blocks)
    total = len(header) + sum(p.bytes for p in pieces)
    return total, [dataclasses.replace(p, sha256=digests[p.name].hexdigest()) for p in pieces]


def _header(file: str, shards: Mapping[str, Shard]) -> tuple[bytes, list[Piece]]:
    """The header of the file (8 bytes of length, then JSON, padded), and its pieces without their
    digests.
    """
    entries: Json = {"__metadata__": {"format": "pt"}}
    pieces, end = [], 0
    for name, shard in shards.items():
        if shard.tensor.dtype not in _DTYPES:
            expected = "one of safetensors: " + ", ".join(_BY_NAME)
            fix = "keep it in another type, or register it with persistent=False"
            raise CheckpointError(
                f"tensor '{name}' has a type that no checkpoint holds",
                str(shard.tensor.dtype),
                expected,
                fix,
            )
        size, rows = _size(shard.tensor), len(shard.tensor) if shard.tensor.ndim else 0
        entries[name] = {
            "dtype": _DTYPES[shard.tensor.dtype],
            "shape": list(shard.tensor.shape),
            "data_offsets": [end, end + size],
        }
        pieces.append(
            Piece(
                name,
                file,
                end,
                size,
                "",
                _DTYPES[shard.tensor.dtype],
                shard.global_shape,
                shard.start,
                rows,
            )
        )
        end += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, [
        dataclasses.replace(p, offset=p.offset + 8 + len(text)) for p in pieces
    ]


def read(storage: Storage, folder: str, piece: Piece) -> Tensor:
    """A piece's tensor. Raises CheckpointError where it is missing, short or differs from what was
    written.
    """
    where = f"{folder}/{piece.file}"
    # a bytearray: torch wants memory that it may write to
    data, digest = bytearray(), hashlib.sha256()
    try:
        for start in range(piece.offset, piece.offset + piece.bytes, _BLOCK_BYTES):
            block = storage.read(
                where, start, min(start + _BLOCK_BYTES, piece.offset + piece.bytes)
            )
            digest.update(block)
            data += block
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint file {where} is missing",
            None,
            "all that its manifest names",
            "an earlier one is used instead",
        ) from error
    if len(data) != piece.bytes or digest.hexdigest() != piece.sha256:
        got = f"{len(data)} bytes of '{piece.name}'"
        raise CheckpointError(
            f"checkpoint file {where} is damaged",
            got,
            f"{piece.bytes} bytes, intact",
            "an earlier one is used instead",
        )
    if not data:
        return torch.empty(piece.shape, dtype=_BY_NAME[piece.dtype])
    return torch.frombuffer(data, dtype=_BY_NAME[piece.dtype]).view(piece.shape)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
