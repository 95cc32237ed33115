"""The files inside a trajectory store: Zarr v3 metadata, and chunks with their checksum.

In: field declarations and stored arrays. Out: bytes and paths. The metadata is written here, not through the zarr
library, because it is the commit record: each file must be a pure function of its content and be replaced atomically.
Knows nothing of commit order, which is trajectory.py's.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Blosc

from dig_shards.durable import UNSEALED, crc32c, read_sealed
from dig_shards.errors import ShardError
from dig_shards.fields import FieldSpec

FORMAT = "dig-trajectory"
VERSION = 1
_CODEC = Blosc(cname="zstd", clevel=5, shuffle=Blosc.BITSHUFFLE, blocksize=0)
_CHECKSUM_BYTES = 4
_LARGEST_CHUNK = 2**31 - 17  # what Blosc takes in one buffer


@dataclass(frozen=True)
class Root:
    """What the root zarr.json says; `n_frames` is None while the store grows."""

    fields: tuple[FieldSpec, ...]
    chunk_frames: int
    attributes: dict[str, Any]
    n_frames: int | None

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.fields]
        if not names or len(set(names)) != len(names):
            raise ShardError(f"a trajectory needs one or more fields with distinct names, got {names}")
        if self.chunk_frames < 1:
            raise ShardError(f"chunk_frames is {self.chunk_frames}, expected at least 1")
        for spec in self.fields:
            if spec.frame_bytes * self.chunk_frames > _LARGEST_CHUNK:
                raise ShardError(f"field {spec.name}: a chunk of {self.chunk_frames} frames passes 2 GiB; use fewer")

    def to_json(self) -> dict[str, Any]:
        """The root group's metadata, yet unsealed."""
        state = {"state": "growing"} if self.n_frames is None else {"state": "finished", "n_frames": self.n_frames}
        ours = {
            "format": FORMAT,
            "version": VERSION,
            **state,
            "chunk_frames": self.chunk_frames,
            "fields": [spec.to_json() for spec in self.fields],
            "user": self.attributes,
            "dig_seal": UNSEALED,
        }
        return {"zarr_format": 3, "node_type": "group", "attributes": ours}


def read_root(path: Path) -> Root:
    """The root metadata of a store; raises ShardError when it is missing, damaged, or of another format."""
    if not path.is_dir():
        raise ShardError(f"{path}: no trajectory store here")
    ours = read_sealed(path / "zarr.json").get("attributes", {})
    if ours.get("format") != FORMAT or ours.get("version") != VERSION:
        found = f"{ours.get('format')} version {ours.get('version')}"
        raise ShardError(f"{path}: is {found}; this package reads {FORMAT} version {VERSION}")
    fields = tuple(FieldSpec.from_json(field) for field in ours["fields"])
    return Root(fields, ours["chunk_frames"], ours["user"], ours.get("n_frames"))


def array_metadata(spec: FieldSpec, chunk_frames: int, n_frames: int) -> dict[str, Any]:
    """The zarr.json of one field, yet unsealed."""
    blosc = {"typesize": spec.storage.itemsize, "cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [n_frames, *spec.shape],
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk_frames, *spec.shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0 if spec.storage.kind == "f" else 0,
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "blosc", "configuration": blosc},
            {"name": "crc32c"},
        ],
        "attributes": {"scale": spec.scale, "unit": spec.unit, "dig_seal": UNSEALED},
    }


def chunk_path(path: Path, spec: FieldSpec, index: int) -> Path:
    """Where chunk `index` of a field lies."""
    return path / spec.name / f"c.{index}{'.0' * len(spec.shape)}"


def expected_files(spec: FieldSpec, chunk_frames: int, n_frames: int) -> frozenset[str]:
    """The names of all files of a field's directory when the store holds n_frames."""
    count = -(-n_frames // chunk_frames)
    return frozenset(["zarr.json", *(chunk_path(Path(), spec, index).name for index in range(count))])


def encode_chunk(spec: FieldSpec, chunk_frames: int, stored: np.ndarray) -> bytes:
    """The file of a chunk: stored values [F <= chunk_frames, *shape], padded with zeros, compressed, then CRC-32C."""
    whole = np.zeros((chunk_frames, *spec.shape), spec.storage)
    whole[: len(stored)] = stored
    compressed = bytes(_CODEC.encode(whole))
    return compressed + struct.pack("<I", crc32c(compressed))


def read_chunk(path: Path, spec: FieldSpec, chunk_frames: int, index: int) -> np.ndarray:
    """Stored values [chunk_frames, *shape] of a chunk; raises ShardError when its file is missing or damaged."""
    file = chunk_path(path, spec, index)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise ShardError(f"{file}: chunk is missing; restore it from a copy") from None
    compressed, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if struct.pack("<I", crc32c(compressed)) != checksum:
        raise ShardError(f"{file}: checksum mismatch, the chunk is damaged; restore it from a copy")
    values = np.frombuffer(_CODEC.decode(compressed), spec.storage)
    expected = (chunk_frames, *spec.shape)
    if values.size != int(np.prod(expected)):
        raise ShardError(f"{file}: holds {values.size} values, expected {list(expected)}; restore it from a copy")
    return values.reshape(expected)


def stored_checksum(path: Path, spec: FieldSpec, index: int) -> bytes:
    """The last four bytes of a chunk file, its CRC-32C, read without the rest."""
    file = chunk_path(path, spec, index)
    try:
        with open(file, "rb") as stream:
            stream.seek(-_CHECKSUM_BYTES, 2)
            return stream.read()
    except OSError as error:
        raise ShardError(f"{file}: cannot read the chunk's checksum ({error}); restore it from a copy") from error
