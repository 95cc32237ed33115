"""Pack trajectories into a dataset of WebDataset shards.

In: trajectory sources, a PackPlan, opaque sidecar texts per system. Out: a directory of tars, indexes, sidecars and,
renamed last of all, manifest.json; see data_shards/README.md. Until the manifest is there the directory is no dataset,
and packing again starts over. Frames of a system are shuffled (see shuffle.py for the memory bound); systems follow one
another in the order of their ids. Knows nothing of molecules.
"""

from __future__ import annotations

import datetime
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dig_shards.durable import replace_durably, sha256
from dig_shards.errors import ShardError
from dig_shards.lock import WriterLock, lock_path
from dig_shards.manifest import (
    MANIFEST,
    TRAIN,
    VALIDATION,
    Manifest,
    ShardEntry,
    SystemEntry,
    TrajectoryEntry,
    load_manifest,
)
from dig_shards.plan import Draw, PackPlan, Split, TrajectorySource, kept_fields, request_digest, resolve_sources
from dig_shards.shard_writer import Group, ShardWriter
from dig_shards.shuffle import shuffled_rows

Progress = Callable[[int, int], None]
_SCRATCH = ".scratch"
_SYSTEMS = "systems"


def pack(
    trajectories: Sequence[TrajectorySource],
    out: Path | str,
    plan: PackPlan,
    sidecars: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    memory_bytes: int = 2**28,
) -> Manifest:
    """Pack the drawn frames into `out` and return its manifest; returns at once if that very dataset is there.

    `sidecars`: text per system id, stored as systems/<id>.json. `progress(done, total)` counts each frame twice, when
    read and when written. `memory_bytes` bounds the working set and does not change the result. The same trajectories,
    plan and sidecars give byte-identical tars. Raises ShardError, before writing, for sources or plans that do not fit,
    a directory that holds another dataset or foreign files, or another packer at work there.
    """
    out, texts = Path(out), dict(sidecars or {})
    draws = resolve_sources(trajectories, plan)
    split = Split.of(draws, plan)
    unknown = sorted(set(texts) - {draw.system for draw in draws})
    if unknown:
        raise ShardError(f"sidecars given for systems {unknown} that no trajectory is of; check the system ids")
    prints = tuple(draw.reader.fingerprint() for draw in draws)
    request = request_digest(draws, plan, texts, prints)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = WriterLock.acquire(lock_path(out))
    try:
        if (out / MANIFEST).exists():
            return _finished(out, request)
        _clear(out, plan)
        shards = _write_shards(
            out, draws, split, _Ticker(progress, 2 * sum(draw.count for draw in draws)), memory_bytes
        )
        systems = _write_systems(out, draws, plan, texts, shards.frames)
        rows = tuple(_trajectory_entry(draw, text) for draw, text in zip(draws, prints, strict=True))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        manifest = Manifest(plan.name, plan.to_json(), request, now, systems, rows, shards.entries)
        replace_durably(out / MANIFEST, manifest.to_bytes())
        return load_manifest(out)
    finally:
        lock.release()


@dataclass(frozen=True)
class _Written:
    entries: dict[str, tuple[ShardEntry, ...]]
    frames: dict[str, dict[str, int]]


class _Ticker:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def _finished(out: Path, request: str) -> Manifest:
    manifest = load_manifest(out)
    if manifest.request_sha256 != request:
        raise ShardError(
            f"{out}: holds the finished dataset {manifest.name!r} of {manifest.created}, made from another plan or "
            f"other trajectories; choose another directory, or remove this one"
        )
    return manifest


def _clear(out: Path, plan: PackPlan) -> None:
    """Remove what an interrupted pack of the same name left; refuse to touch anything else."""
    out.mkdir(exist_ok=True)
    ours = re.compile(rf"{re.escape(plan.name)}-({TRAIN}|{VALIDATION})-\d{{6}}\.(tar|index\.json)(\.tmp)?")
    allowed = {_SCRATCH, _SYSTEMS, MANIFEST + ".tmp"}
    entries = sorted(out.iterdir())
    for entry in entries:
        if entry.name not in allowed and not ours.fullmatch(entry.name):
            raise ShardError(
                f"{out}: holds {entry.name}, which no pack of {plan.name!r} wrote; give an empty directory"
            )
    for entry in entries:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _write_shards(out: Path, draws: Sequence[Draw], split: Split, ticker: _Ticker, memory_bytes: int) -> _Written:
    plan = split.plan
    names = (TRAIN, VALIDATION)
    writers = {
        name: ShardWriter(out, f"{plan.name}-{name}", plan.frames_per_member, plan.members_per_shard) for name in names
    }
    scratch = out / _SCRATCH
    scratch.mkdir()
    frames: dict[str, dict[str, int]] = {}
    try:
        for number, (system, mine) in enumerate(_by_system(draws)):
            streams = [_MemberStream(writers[name], number, mine[0], plan) for name in names]
            for rows in shuffled_rows(mine, split, number, scratch, memory_bytes, ticker.advance):
                streams[0].extend(rows[~rows["validation"]])
                streams[1].extend(rows[rows["validation"]])
                ticker.advance(len(rows))
            frames[system] = {name: stream.flush() for name, stream in zip(names, streams, strict=True)}
        entries = {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
        shutil.rmtree(scratch)
    return _Written(entries, frames)


def _by_system(draws: Sequence[Draw]) -> list[tuple[str, list[Draw]]]:
    groups: dict[str, list[Draw]] = {}
    for draw in draws:
        groups.setdefault(draw.system, []).append(draw)
    return sorted(groups.items())


class _MemberStream:
    """Cuts the rows of one system and split into members; the last may be shorter."""

    def __init__(self, writer: ShardWriter, number: int, draw: Draw, plan: PackPlan) -> None:
        self._writer, self._size = writer, plan.frames_per_member
        self._number, self._system, self._fields = number, draw.system, kept_fields(draw, plan)
        self._left: np.ndarray | None = None
        self._frames = 0

    def extend(self, rows: np.ndarray) -> None:
        if self._left is not None and len(self._left):
            rows = np.concatenate([self._left, rows])
        whole = len(rows) - len(rows) % self._size
        for begin in range(0, whole, self._size):
            self._emit(rows[begin : begin + self._size])
        self._left = rows[whole:].copy()

    def flush(self) -> int:
        """Write the shorter last member, if any; returns the frames written in all."""
        if self._left is not None and len(self._left):
            self._emit(self._left)
        self._left = None
        return self._frames

    def _emit(self, rows: np.ndarray) -> None:
        self._writer.add(Group(self._number, self._system, self._fields, rows))
        self._frames += len(rows)


def _write_systems(
    out: Path, draws: Sequence[Draw], plan: PackPlan, texts: Mapping[str, str], frames: Mapping[str, Mapping[str, int]]
) -> tuple[SystemEntry, ...]:
    fields = {draw.system: kept_fields(draw, plan) for draw in draws}
    if texts:
        (out / _SYSTEMS).mkdir()
    entries = []
    for system in sorted(fields):
        sidecar, digest = None, None
        if system in texts:
            data = texts[system].encode()
            sidecar, digest = f"{_SYSTEMS}/{system}.json", sha256(data)
            replace_durably(out / sidecar, data)
        entries.append(SystemEntry(system, fields[system], sidecar, digest, frames[system]))
    return tuple(entries)


def _trajectory_entry(draw: Draw, fingerprint: str) -> TrajectoryEntry:
    return TrajectoryEntry(
        name=draw.name,
        system=draw.system,
        start=draw.start,
        stop=draw.stop,
        stride=draw.stride,
        frames=draw.count,
        fingerprint=fingerprint,
        origin=draw.reader.attributes.get("origin"),
    )
