"""Read any frames of a packed dataset, by number, straight from its tars.

In: a dataset directory and a split; frame ids 0..n_frames. Out: decoded arrays. Ids follow the manifest's shards and
the members in them, so the frames of one system have contiguous ids (`offsets`), already shuffled within it. Frames are
cut out of memory-mapped tars with offsets from the index; which ids to read in which order is order.py's. Checksums are
not looked at here beyond those of manifest and indexes: run verify on data you received. Knows no molecules.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from dig_shards.durable import crc32c, sha256
from dig_shards.errors import ShardError
from dig_shards.fields import decode
from dig_shards.manifest import META, Manifest, ShardEntry, ShardIndex, SystemEntry, load_manifest, parse_index
from dig_shards.order import Cursor, SystemBatch, batch_ids, system_batch
from dig_shards.record import Record, Source

__all__ = ["Cursor", "ShardReader", "SystemBatch", "SystemFrames", "batch_ids", "system_batch"]

_OPEN_TARS = 512


@dataclass(frozen=True)
class SystemFrames:
    """Frames of one system out of a request: `places` in the request, and `arrays[field]`, [len(places), *shape]."""

    system: int
    system_id: str
    places: np.ndarray
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Members:
    """All members of a split, column by column; `end[i]` is one past the last frame id of member i."""

    end: np.ndarray
    begin: np.ndarray
    shard: np.ndarray
    system: np.ndarray
    offset: Mapping[str, np.ndarray]
    size: Mapping[str, np.ndarray]
    crc32c: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Places:
    member: np.ndarray
    within: np.ndarray


class ShardReader:
    """Random access to one split of a dataset; cheap to copy to worker processes, which open their own files.

    Raises ShardError when the dataset is unfinished, an index is missing or altered, or the split has no frames.
    """

    def __init__(self, directory: Path | str, split: str) -> None:
        self.directory = Path(directory)
        self.split = split
        self.manifest: Manifest = load_manifest(self.directory)
        self._shards = self.manifest.shards.get(split, ())
        if not self._shards:
            known = ", ".join(name for name, rows in self.manifest.shards.items() if rows)
            raise ShardError(f"{self.directory}: split {split!r} has no frames; splits with frames: {known}")
        self._members = _load_members(self.directory, self._shards)
        self._tar = lru_cache(maxsize=_OPEN_TARS)(self._open_tar)
        self.n_frames = int(self._members.end[-1])
        counts = [system.frames.get(split, 0) for system in self.manifest.systems]
        self.offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if self.offsets[-1] != self.n_frames:
            raise ShardError(f"{self.directory}: indexes hold {self.n_frames} frames, the manifest {self.offsets[-1]}")

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Path, str]]:
        return ShardReader, (self.directory, self.split)

    @property
    def systems(self) -> tuple[SystemEntry, ...]:
        """All systems of the dataset; those without frames in this split have an empty range in `offsets`."""
        return self.manifest.systems

    def sidecar(self, system: int) -> str:
        """The text given for a system when packing; raises ShardError when there is none or it was altered."""
        entry = self.systems[system]
        if entry.sidecar is None:
            raise ShardError(f"{self.directory}: system {entry.id} was packed without a sidecar")
        file = self.directory / entry.sidecar
        data = file.read_bytes() if file.is_file() else b""
        if sha256(data) != entry.sidecar_sha256:
            raise ShardError(f"{file}: missing or altered; restore it from a copy")
        return data.decode()

    def frame_system(self, frame_ids: np.ndarray) -> np.ndarray:
        """System number of each frame id, int64, same shape."""
        return np.asarray(self._members.system[self._locate(frame_ids).member])

    def read_batch(self, frame_ids: np.ndarray, field: str) -> np.ndarray:
        """One field [len(frame_ids), *shape] of frames of one system, in the order asked; float32 for a grid field.

        Raises ShardError for ids outside 0..n_frames, frames of several systems, or an unknown field.
        """
        places = self._locate(frame_ids)
        systems = self._members.system[places.member]
        if not len(systems) or (systems != systems[0]).any():
            raise ShardError(
                f"read_batch takes frames of one system, got systems {np.unique(systems).tolist()}; use read"
            )
        return self._gather(places, int(systems[0]), field)

    def read(self, frame_ids: np.ndarray, fields: Sequence[str] | None = None) -> tuple[SystemFrames, ...]:
        """All fields, or those named, of any frames, grouped by system in ascending system number."""
        places = self._locate(frame_ids)
        systems = self._members.system[places.member]
        groups = []
        for system in np.unique(systems).tolist():
            mine = np.flatnonzero(systems == system)
            names = [spec.name for spec in self.systems[system].fields] if fields is None else fields
            some = _Places(places.member[mine], places.within[mine])
            arrays = {name: self._gather(some, system, name) for name in names}
            groups.append(SystemFrames(system, self.systems[system].id, mine, arrays))
        return tuple(groups)

    def record(self, frame_id: int) -> Record:
        """One frame with its source; raises ShardError for an id outside 0..n_frames or damaged metadata."""
        places = self._locate(np.array([frame_id]))
        member, within = int(places.member[0]), int(places.within[0])
        entry = self.systems[int(self._members.system[member])]
        meta = json.loads(self._meta(member))
        trajectory = self.manifest.trajectories[meta["trajectory"][within]].name
        (group,) = self.read(np.array([frame_id]))
        arrays = {name: values[0] for name, values in group.arrays.items()}
        return Record(entry.id, Source(trajectory, meta["frame"][within]), arrays, entry.fields)

    def _locate(self, frame_ids: np.ndarray) -> _Places:
        ids = np.asarray(frame_ids, np.int64)
        if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < self.n_frames):
            raise ShardError(
                f"{self.directory}: frame ids {ids.min()}..{ids.max()} asked, {self.split} has {self.n_frames}"
            )
        member = np.searchsorted(self._members.end, ids, side="right")
        return _Places(member, ids - self._members.begin[member])

    def _gather(self, places: _Places, system: int, field: str) -> np.ndarray:
        spec = self.systems[system].spec(field)
        size = spec.frame_bytes
        starts = self._members.offset[f"{field}.bin"][places.member] + places.within * size
        shards = self._members.shard[places.member]
        # Slicing views in a plain loop costs the same however many tars a batch touches.
        tar = self._tar
        raw = b"".join([tar(shard)[at : at + size] for shard, at in zip(shards.tolist(), starts.tolist(), strict=True)])
        return decode(spec, np.frombuffer(raw, spec.storage).reshape(len(starts), *spec.shape))

    def _meta(self, member: int) -> bytes:
        shard, start = int(self._members.shard[member]), int(self._members.offset[META][member])
        data = bytes(self._tar(shard)[start : start + int(self._members.size[META][member])])
        if crc32c(data) != int(self._members.crc32c[META][member]):
            raise ShardError(
                f"{self.directory / self._shards[shard].tar}: metadata of member {member} is damaged; verify"
            )
        return data

    def _open_tar(self, number: int) -> memoryview:
        shard = self._shards[number]
        path = self.directory / shard.tar
        try:
            with open(path, "rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError) as error:
            raise ShardError(f"{path}: cannot open this shard ({error}); restore it or pack again") from error
        if len(mapped) != shard.tar_bytes:
            raise ShardError(f"{path}: {len(mapped)} bytes, expected {shard.tar_bytes}; restore it or pack again")
        return memoryview(mapped)


def _load_members(directory: Path, shards: Sequence[ShardEntry]) -> _Members:
    indexes = [_load_index(directory, shard) for shard in shards]
    endings = sorted({ending for index in indexes for ending in index.files})
    end = np.cumsum(np.concatenate([index.frames for index in indexes])).astype(np.int64)
    columns = {
        name: {
            e: np.concatenate([getattr(index.files[e], name) for index in indexes]).astype(np.int64) for e in endings
        }
        for name in ("offset", "size", "crc32c")
    }
    return _Members(
        end=end,
        begin=np.concatenate([[0], end[:-1]]),
        shard=np.repeat(np.arange(len(indexes)), [len(index.keys) for index in indexes]),
        system=np.concatenate([index.systems for index in indexes]).astype(np.int64),
        **columns,
    )


def _load_index(directory: Path, shard: ShardEntry) -> ShardIndex:
    path = directory / shard.index
    if not path.is_file():
        raise ShardError(f"{path}: missing index; restore it or pack again")
    data = path.read_bytes()
    if sha256(data) != shard.index_sha256:
        raise ShardError(f"{path}: is not the index the manifest lists; restore it or pack again")
    return parse_index(data, shard.index)
