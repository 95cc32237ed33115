"""The durable state of one replica: a write-ahead journal and one trajectory store per temperature.

In: LadderStates and chunks of frames. Out: stores that after any crash go on from the last chunk, no frame twice and
none missing, at every temperature alike. Order of a commit: the journal file, holding the new state and the chunk's
frames, is replaced atomically; then the chunk is appended to every store. Opening first appends what a crash left out.

    SYSTEM/replica0.zarr            trajectory (with exchange: replica0-T300.zarr, replica0-T350.zarr, ...; with walkers
                                    that are advanced together: replica0-W000.zarr, replica0-W001.zarr, ...)
    SYSTEM/replica0.journal         state and last chunk while the replica runs
    SYSTEM/replica0.json            summary, once it is complete
    SYSTEM/replica0.lock            held (flock) by the process that runs it
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dig_shards.durable import replace_durably, sync_directory
from dig_shards.trajectory import TrajectoryWriter

from dig_scale import records
from dig_scale.simulation.engine import PhaseSpace, SimulationError
from dig_scale.simulation.ladder import LadderState
from dig_scale.system import Frames, System

_LOCK_PATIENCE_S = 60.0


@dataclass(frozen=True)
class ReplicaFiles:
    """Where one replica lies: folder, name, and one store per temperature."""

    folder: Path
    name: str
    stores: tuple[Path, ...]

    @property
    def journal(self) -> Path:
        """State and last chunk while the replica runs."""
        return self.folder / f"{self.name}.journal"

    @property
    def summary(self) -> Path:
        """Written once, when the replica is complete."""
        return self.folder / f"{self.name}.json"

    @property
    def lock(self) -> Path:
        """Held by the process that runs the replica."""
        return self.folder / f"{self.name}.lock"


def replica_files(out: Path, system: str, replica: int, temperatures: Sequence[float]) -> ReplicaFiles:
    """The files of a replica below the campaign's folder: one store per temperature, or per walker at one temperature."""
    name, folder = f"replica{replica}", out / system
    if len(temperatures) == 1:
        return ReplicaFiles(folder, name, (folder / f"{name}.zarr",))
    if len(set(temperatures)) == 1:
        walkers = range(len(temperatures))
        return ReplicaFiles(folder, name, tuple(folder / f"{name}-W{walker:03d}.zarr" for walker in walkers))
    return ReplicaFiles(folder, name, tuple(folder / f"{name}-T{kelvin:g}.zarr" for kelvin in temperatures))


@dataclass(frozen=True)
class Entry:
    """One journal entry: the state reached, the CPU seconds spent, and the chunk that led there (empty at the start)."""

    state: LadderState
    cpu_seconds: float
    chunk: tuple[Frames, ...]

    @property
    def first_frame(self) -> int:
        """Frames that each store held before this chunk."""
        return self.state.frames - (self.chunk[0].n_frames if self.chunk else 0)


class ReplicaJournal:
    """The one writer of a replica's files; `close` gives its locks back."""

    def __init__(
        self, files: ReplicaFiles, lock: int, writers: tuple[TrajectoryWriter, ...], total: int, entry: Entry | None
    ) -> None:
        self._files, self._lock, self._writers, self._total = files, lock, writers, total
        self.entry = entry

    @classmethod
    def open(
        cls, files: ReplicaFiles, system: System, origins: Sequence[dict[str, Any]], frames: int, chunk_frames: int
    ) -> ReplicaJournal:
        """Open or create the files, completing what a crash interrupted; raises SimulationError if they disagree."""
        files.folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(files.lock)
        opened: list[TrajectoryWriter] = []
        try:
            entry = _load(files.journal)
            for path, origin in zip(files.stores, origins, strict=True):
                opened.append(_writer(path, system, origin, chunk_frames, entry))
            journal = cls(files, lock, tuple(opened), frames, entry)
            journal._settle()
        except BaseException:
            for writer in opened:
                writer.close()
            os.close(lock)
            raise
        return journal

    @property
    def is_complete(self) -> bool:
        """Whether all frames are stored."""
        return self.entry is not None and self.entry.state.frames == self._total

    def commit(self, entry: Entry) -> None:
        """Store an entry: all of it or, after a crash, nothing."""
        replace_durably(self._files.journal, _dump(entry))
        self.entry = entry
        self._settle()

    def conclude(self, summary: dict[str, Any]) -> None:
        """Write the summary of a complete replica and drop the journal."""
        replace_durably(self._files.summary, (json.dumps(summary, indent=1) + "\n").encode())
        self._files.journal.unlink(missing_ok=True)
        sync_directory(self._files.folder)

    def close(self) -> None:
        """Give the locks back."""
        for writer in self._writers:
            writer.close()
        os.close(self._lock)

    def _settle(self) -> None:
        for rung, writer in enumerate(self._writers):
            if self.entry is None:
                _require(writer, writer.n_frames == 0, "holds frames but its journal is gone")
                continue
            missing = writer.n_frames < self.entry.state.frames
            expected = self.entry.first_frame if missing else self.entry.state.frames
            _require(writer, writer.n_frames == expected, f"expected {expected}")
            arrays = records.frame_arrays(self.entry.chunk[rung]) if missing else None
            if self.is_complete and not writer.is_finished:
                writer.finish(arrays)
            elif arrays is not None:
                writer.append_chunk(arrays)


def _require(writer: TrajectoryWriter, good: bool, problem: str) -> None:
    if not good:
        raise SimulationError(
            f"{writer.path}: has {writer.n_frames} frames: {problem}; restore the folder from a copy, or remove it and "
            f"simulate again"
        )


def _writer(
    path: Path, system: System, origin: dict[str, Any], chunk_frames: int, entry: Entry | None
) -> TrajectoryWriter:
    if path.is_dir():
        return TrajectoryWriter.resume(path)
    if entry is not None:
        raise SimulationError(
            f"{path} is gone but its journal is there; restore it, or remove {path.parent} and simulate again"
        )
    fields = records.field_specs(system.n_sites, (records.POSITIONS, records.ENERGY, records.FORCES))
    return TrajectoryWriter.create(path, fields, records.trajectory_attributes(system, origin), chunk_frames)


def _lock(path: Path) -> int:
    """An exclusive lock that the kernel gives back when its holder dies, however it dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise SimulationError(
                    f"{path} is held by another process; wait for it or stop it, then run again"
                ) from None
            time.sleep(0.1)


def _dump(entry: Entry) -> bytes:
    state = entry.state
    header = {
        "format_version": 1,
        "chunk": state.chunk,
        "frames": state.frames,
        "steps": [point.step for point in state.points],
        "tried": state.tried,
        "accepted": state.accepted,
        "cpu_seconds": entry.cpu_seconds,
        "has_chunk": len(entry.chunk),
    }
    arrays: dict[str, np.ndarray] = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
    for rung, point in enumerate(state.points):
        arrays |= {f"point_positions_{rung}": point.positions, f"point_velocities_{rung}": point.velocities}
    for rung, frames in enumerate(entry.chunk):
        arrays |= {f"time_ps_{rung}": frames.time_ps}
        arrays |= {f"{name}_{rung}": values for name, values in records.frame_arrays(frames).items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _load(path: Path) -> Entry | None:
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as content:
        arrays = {name: content[name] for name in content.files}
    header = json.loads(arrays["header"].tobytes())
    if header["format_version"] != 1:
        raise SimulationError(f"{path}: journal format {header['format_version']}, this version reads 1")
    points = tuple(
        PhaseSpace(arrays[f"point_positions_{rung}"], arrays[f"point_velocities_{rung}"], step)
        for rung, step in enumerate(header["steps"])
    )
    chunk = tuple(
        Frames(
            arrays[f"positions_{rung}"],
            arrays[f"time_ps_{rung}"],
            arrays.get(f"energy_{rung}"),
            arrays.get(f"forces_{rung}"),
        )
        for rung in range(header["has_chunk"])
    )
    state = LadderState(header["chunk"], header["frames"], points, tuple(header["tried"]), tuple(header["accepted"]))
    return Entry(state, header["cpu_seconds"], chunk)
