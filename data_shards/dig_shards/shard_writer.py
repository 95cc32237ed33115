"""Write members into WebDataset tars with an index beside each.

In: groups of rows of one system. Out: `<set>-<split>-NNNNNN.tar` and `.index.json`, each complete or absent: the tar is
written as `.tmp`, flushed, renamed, and its index is renamed last. Headers are plain USTAR with fixed owner, mode and
time, so equal content gives equal bytes. Knows nothing of trajectories, splits or shuffling.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from dig_shards.durable import TEMPORARY_SUFFIX, crc32c, replace_durably, sha256, sync_directory
from dig_shards.fields import FieldSpec
from dig_shards.manifest import META, FileColumn, ShardEntry, ShardIndex

_BLOCK, _RECORD = 512, 10240


@dataclass(frozen=True)
class Group:
    """The frames of one member: structured rows (see shuffle.row_dtype) of one system."""

    system_number: int
    system_id: str
    fields: tuple[FieldSpec, ...]
    rows: np.ndarray


class ShardWriter:
    """Appends members of one split to numbered shards; `finish` returns what was written."""

    def __init__(self, directory: Path, prefix: str, frames_per_member: int, members_per_shard: int) -> None:
        self._directory = directory
        self._prefix = prefix
        self._frames_per_member = frames_per_member
        self._members_per_shard = members_per_shard
        self._members = 0
        self._open: _OpenShard | None = None
        self._done: list[ShardEntry] = []

    def add(self, group: Group) -> None:
        """Append one member, beginning a shard when there is none and ending it when it is full."""
        if self._open is None:
            self._open = _OpenShard.begin(self._directory, f"{self._prefix}-{len(self._done):06d}.tar")
        key = f"{self._prefix}-{self._members:09d}"
        self._open.add_member(key, group, self._frames_per_member)
        self._members += 1
        if len(self._open.keys) == self._members_per_shard:
            self._end_shard()

    def finish(self) -> tuple[ShardEntry, ...]:
        """End the last shard; returns all shards in order."""
        self._end_shard()
        return tuple(self._done)

    def abandon(self) -> None:
        """Close the file of an unfinished shard, which stays `.tmp`."""
        if self._open is not None:
            self._open.stream.close()

    def _end_shard(self) -> None:
        if self._open is not None:
            self._done.append(self._open.end())
            self._open = None


@dataclass
class _OpenShard:
    path: Path
    stream: IO[bytes]
    digest: "hashlib._Hash"
    size: int = 0
    keys: list[str] = field(default_factory=list)
    systems: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    files: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)

    @classmethod
    def begin(cls, directory: Path, name: str) -> _OpenShard:
        stream = open(directory / (name + TEMPORARY_SUFFIX), "wb")  # noqa: SIM115 - closed by end or abandon
        return cls(directory / name, stream, hashlib.sha256())

    def add_member(self, key: str, group: Group, frames_per_member: int) -> None:
        for spec in group.fields:
            stored = np.ascontiguousarray(group.rows["fields"][spec.name])
            self._add_file(key, f"{spec.name}.bin", stored.tobytes())
        self._add_file(key, META, member_meta(group, frames_per_member))
        self.keys.append(key)
        self.systems.append(group.system_number)
        self.frames.append(len(group.rows))

    def end(self) -> ShardEntry:
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self.size % _RECORD))
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        os.replace(self.stream.name, self.path)
        sync_directory(self.path.parent)
        index = self._index()
        data = index.to_bytes()
        index_path = self.path.with_name(index_name(self.path.name))
        replace_durably(index_path, data)
        return ShardEntry(
            tar=self.path.name,
            tar_sha256=index.tar_sha256,
            tar_bytes=self.size,
            index=index_path.name,
            index_sha256=sha256(data),
            members=len(self.keys),
            frames=sum(self.frames),
        )

    def _index(self) -> ShardIndex:
        return ShardIndex(
            tar=self.path.name,
            tar_sha256=self.digest.hexdigest(),
            tar_bytes=self.size,
            keys=tuple(self.keys),
            systems=tuple(self.systems),
            frames=tuple(self.frames),
            files={ending: FileColumn(*zip(*rows, strict=True)) for ending, rows in self.files.items()},
        )

    def _add_file(self, key: str, ending: str, data: bytes) -> None:
        header = tarfile.TarInfo(f"{key}.{ending}")
        header.size = len(data)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        self.files.setdefault(ending, []).append((self.size, len(data), crc32c(data)))
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))

    def _write(self, data: bytes) -> None:
        self.stream.write(data)
        self.digest.update(data)
        self.size += len(data)


def index_name(tar: str) -> str:
    """The index file of a tar."""
    return tar.removesuffix(".tar") + ".index.json"


def member_meta(group: Group, frames_per_member: int) -> bytes:
    """KEY.meta.json: enough to decode the member by hand, and each frame's source."""
    document = {
        "system": group.system_id,
        "n_frames": len(group.rows),
        "frames_per_member": frames_per_member,
        "fields": {spec.name: _field_meta(spec) for spec in group.fields},
        "trajectory": group.rows["source"].tolist(),
        "frame": group.rows["frame"].tolist(),
    }
    return json.dumps(document).encode()


def _field_meta(spec: FieldSpec) -> dict[str, object]:
    return {"dtype": spec.storage.str, "shape": list(spec.shape), "scale": spec.scale, "unit": spec.unit}
