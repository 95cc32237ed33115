"""A trajectory: named per-frame arrays that grow chunk by chunk in a Zarr v3 store.

In: arrays [frames, *shape] of the declared fields, chunk_frames at a time. Out: the same arrays, on their grid, from a
directory that any Zarr v3 reader opens.

    NAME.zarr/zarr.json              root group; `attributes` holds the format, the fields, state and caller's JSON
    NAME.zarr/FIELD/zarr.json        shape [frames, *shape], chunks [chunk_frames, *shape]
    NAME.zarr/FIELD/c.K.0...         chunk K: blosc-zstd of little-endian values, then its CRC-32C

Commit: all chunk files of chunk K are flushed to disk; then each field's zarr.json, in declared order, is replaced by
one whose shape includes them. The chunk exists when the last of these is in place, so a growing store holds
min over fields of whole chunks, whenever its writer died; `resume` removes what lies beyond. Only `finish` can add a
shorter chunk, which counts once the root says "finished". Knows nothing of molecules, engines or the attributes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dig_shards import chunks
from dig_shards.durable import TEMPORARY_SUFFIX, read_sealed, replace_durably, seal, sync_directory, write_synced
from dig_shards.errors import ShardError
from dig_shards.fields import FieldSpec, decode, encode
from dig_shards.lock import WriterLock, lock_path
from dig_shards.verify import verify_trajectory


class TrajectoryReader:
    """The committed frames of a store, as they were when it was opened.

    Raises ShardError when the directory is no trajectory store or its metadata is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        root = chunks.read_root(self.path)
        self.fields = root.fields
        self.attributes: dict[str, Any] = root.attributes
        self.chunk_frames = root.chunk_frames
        self.is_finished = root.n_frames is not None
        self.n_frames = _committed_frames(self.path, root) if root.n_frames is None else root.n_frames
        self._specs = {spec.name: spec for spec in root.fields}

    @property
    def name(self) -> str:
        """The directory's name without `.zarr`."""
        return self.path.name.removesuffix(".zarr")

    def spec(self, field: str) -> FieldSpec:
        """The declaration of a field; raises ShardError listing the fields there are."""
        if field not in self._specs:
            raise ShardError(f"{self.path}: no field {field!r}; it has {', '.join(self._specs)}")
        return self._specs[field]

    def read(self, field: str, start: int, stop: int) -> np.ndarray:
        """Values [stop - start, *shape] of frames start..stop, float32 for a grid field, in the field's unit."""
        return decode(self.spec(field), self.read_raw(field, start, stop))

    def read_raw(self, field: str, start: int, stop: int) -> np.ndarray:
        """Stored values [stop - start, *shape]; raises ShardError for a range not held or a damaged chunk."""
        spec = self.spec(field)
        if not 0 <= start <= stop <= self.n_frames:
            raise ShardError(f"{self.path}: frames {start}..{stop} asked, the store holds 0..{self.n_frames}")
        out = np.empty((stop - start, *spec.shape), spec.storage)
        position = start
        while position < stop:
            index, offset = divmod(position, self.chunk_frames)
            count = min(self.chunk_frames - offset, stop - position)
            chunk = chunks.read_chunk(self.path, spec, self.chunk_frames, index)
            out[position - start : position - start + count] = chunk[offset : offset + count]
            position += count
        return out

    def fingerprint(self) -> str:
        """SHA-256 over the fields, the frame count and every chunk's CRC: equal for equal content, in any directory."""
        digest = hashlib.sha256(repr((self.n_frames, self.chunk_frames)).encode())
        for spec in self.fields:
            digest.update(repr(spec).encode())
            for index in range(-(-self.n_frames // self.chunk_frames)):
                digest.update(chunks.stored_checksum(self.path, spec, index))
        return digest.hexdigest()

    def verify(self) -> None:
        """Read everything; raises ShardError with one line per damaged, missing or foreign file."""
        verify_trajectory(self.path).raise_if_damaged()


class TrajectoryWriter:
    """The one writer of a store; use it as a context manager so that its lock is given back."""

    def __init__(self, path: Path, lock: WriterLock, root: chunks.Root, n_frames: int) -> None:
        self.path = path
        self._lock = lock
        self._root = root
        self._n_frames = n_frames

    @classmethod
    def create(
        cls, path: Path | str, fields: Sequence[FieldSpec], attributes: Mapping[str, Any], chunk_frames: int
    ) -> TrajectoryWriter:
        """A new, empty store; raises ShardError if one is there, or for fields or attributes it cannot hold."""
        path = Path(path)
        root = chunks.Root(tuple(fields), chunk_frames, dict(attributes), None)
        metadata = seal(root.to_json(), indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = WriterLock.acquire(lock_path(path))
        try:
            if path.exists():
                raise ShardError(f"{path}: already exists; resume it, or remove it to start over")
            _create_directory(path, root, metadata)
        except BaseException:
            lock.release()
            raise
        return cls(path, lock, root, 0)

    @classmethod
    def resume(cls, path: Path | str) -> TrajectoryWriter:
        """The writer of an existing store, after dropping whatever follows its last complete chunk.

        A finished store is left as it is (`is_finished`). Raises ShardError if another writer is alive, the metadata
        is damaged, or there is no store.
        """
        path = Path(path)
        if not path.is_dir():
            raise ShardError(f"{path}: no trajectory store here; create it first")
        lock = WriterLock.acquire(lock_path(path))
        try:
            root = chunks.read_root(path)
            n_frames = root.n_frames
            if n_frames is None:
                n_frames = _committed_frames(path, root)
                _drop_uncommitted(path, root, n_frames)
        except BaseException:
            lock.release()
            raise
        return cls(path, lock, root, n_frames)

    @property
    def n_frames(self) -> int:
        """Committed frames."""
        return self._n_frames

    @property
    def is_finished(self) -> bool:
        """True once `finish` has returned; such a store takes no more frames."""
        return self._root.n_frames is not None

    def append_chunk(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add exactly chunk_frames frames, durably and all or nothing: {field: [chunk_frames, *shape]}.

        Raises ShardError, and adds nothing, for wrong fields, shapes or values, or if the lock was lost.
        """
        encoded = self._encode(arrays)
        count = len(encoded[self._root.fields[0].name])
        if count != self._root.chunk_frames:
            raise ShardError(
                f"{self.path}: a chunk of {count} frames given, expected {self._root.chunk_frames}; give a shorter "
                f"last one to finish()"
            )
        self._commit(encoded, count)

    def finish(self, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Close the trajectory for good, with a last chunk of at most chunk_frames frames if given."""
        self._require_open()
        if arrays is not None:
            encoded = self._encode(arrays)
            count = len(encoded[self._root.fields[0].name])
            if not 1 <= count <= self._root.chunk_frames:
                raise ShardError(f"{self.path}: last chunk of {count} frames, expected 1..{self._root.chunk_frames}")
            self._commit(encoded, count)
        root = chunks.Root(self._root.fields, self._root.chunk_frames, self._root.attributes, self._n_frames)
        replace_durably(self.path / "zarr.json", seal(root.to_json(), indent=1))
        self._root = root

    def close(self) -> None:
        """Give the lock back; the store stays as it is, to be resumed or read."""
        self._lock.release()

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self.is_finished:
            raise ShardError(f"{self.path}: finished at {self._n_frames} frames; it takes no more")
        self._lock.check()

    def _encode(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._require_open()
        names = [spec.name for spec in self._root.fields]
        if set(arrays) != set(names):
            raise ShardError(f"{self.path}: fields {sorted(arrays)} given, expected {sorted(names)}")
        where = f"trajectory {self.path.name}"
        encoded = {s.name: encode(s, arrays[s.name], where, self._n_frames) for s in self._root.fields}
        counts = {name: len(stored) for name, stored in encoded.items()}
        if len(set(counts.values())) != 1:
            raise ShardError(f"{self.path}: fields differ in frame count: {counts}")
        return encoded

    def _commit(self, encoded: Mapping[str, np.ndarray], count: int) -> None:
        root, index = self._root, self._n_frames // self._root.chunk_frames
        for spec in root.fields:
            data = chunks.encode_chunk(spec, root.chunk_frames, encoded[spec.name])
            write_synced(chunks.chunk_path(self.path, spec, index), data)
            sync_directory(self.path / spec.name)
        for spec in root.fields:
            _set_length(self.path, spec, root.chunk_frames, self._n_frames + count)
        self._n_frames += count


def _create_directory(path: Path, root: chunks.Root, metadata: bytes) -> None:
    draft = path.with_name(path.name + TEMPORARY_SUFFIX)
    if draft.exists():
        shutil.rmtree(draft)  # left by a writer killed in this very function: it never held a frame
    draft.mkdir()
    for spec in root.fields:
        (draft / spec.name).mkdir()
        _set_length(draft, spec, root.chunk_frames, 0)
    replace_durably(draft / "zarr.json", metadata)
    os.rename(draft, path)
    sync_directory(path.parent)


def _set_length(path: Path, spec: FieldSpec, chunk_frames: int, n_frames: int) -> None:
    metadata = chunks.array_metadata(spec, chunk_frames, n_frames)
    replace_durably(path / spec.name / "zarr.json", seal(metadata, indent=1))


def _committed_frames(path: Path, root: chunks.Root) -> int:
    lengths = [read_sealed(path / spec.name / "zarr.json")["shape"][0] for spec in root.fields]
    return int(min(lengths)) // root.chunk_frames * root.chunk_frames


def _drop_uncommitted(path: Path, root: chunks.Root, n_frames: int) -> None:
    for spec in root.fields:
        if read_sealed(path / spec.name / "zarr.json")["shape"][0] != n_frames:
            _set_length(path, spec, root.chunk_frames, n_frames)
        keep = chunks.expected_files(spec, root.chunk_frames, n_frames)
        for file in sorted((path / spec.name).iterdir()):
            if file.name not in keep:
                file.unlink()
        sync_directory(path / spec.name)
    (path / ("zarr.json" + TEMPORARY_SUFFIX)).unlink(missing_ok=True)
