"""A replica at work in one process: engines, ladder and journal together. What a campaign's actors run.

In: a ReplicaJob. Out: trajectory stores and, after every chunk, how far it is. Opening an interrupted job goes on from
its last chunk. Knows no Ray.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dig_scale import __version__
from dig_scale.config import Simulate
from dig_scale.simulation.engine import Engine
from dig_scale.simulation.force_field import time_step_fs
from dig_scale.simulation.journal import Entry, ReplicaFiles, ReplicaJournal, replica_files
from dig_scale.simulation.ladder import Advance, LadderState, NoiseKey, Timetable, equilibrated, in_turn, next_chunk
from dig_scale.simulation.openmm_engine import OpenMMEngine
from dig_scale.simulation.openmm_systems import stored_or_built
from dig_scale.system import System
from dig_scale.units import PS_PER_NS


@dataclass(frozen=True)
class ReplicaJob:
    """One replica of one system: what to simulate, where it is kept, on which platform, with which seeds."""

    out: Path
    system: System
    simulate: Simulate
    recipe_seed: int
    replica: int
    platform: str

    @property
    def temperatures(self) -> tuple[float, ...]:
        """K, one per rung."""
        return ladder_temperatures(self.simulate)

    @property
    def files(self) -> ReplicaFiles:
        """Where the replica is kept."""
        return replica_files(self.out, self.system.name, self.replica, self.temperatures)

    @property
    def label(self) -> str:
        """Name in messages."""
        return f"{self.system.name}/replica{self.replica}"


@dataclass(frozen=True)
class ReplicaProgress:
    """Frames stored at every temperature, and whether that is all."""

    frames: int
    is_complete: bool


def ladder_temperatures(simulate: Simulate) -> tuple[float, ...]:
    """K, the target first; without replica exchange, the same for every walker."""
    if simulate.replica_exchange:
        return simulate.replica_exchange.temperatures
    return (simulate.temperature,) * simulate.walkers


def simulated_ns(simulate: Simulate, frames: int) -> float:
    """Simulated time in ns of `frames` frames, all temperatures together."""
    return frames * simulate.frame_spacing_ps * len(ladder_temperatures(simulate)) / PS_PER_NS


class ReplicaRun:
    """An opened replica; `advance` once per chunk until complete, then `close`."""

    def __init__(self, job: ReplicaJob) -> None:
        self._job = job
        self._timetable = Timetable.of(job.simulate, time_step_fs(job.system, job.simulate))
        self._noise = NoiseKey(job.recipe_seed, job.simulate.seed, job.system.name, job.replica)
        self._engines, self._together = _engines(job)
        origins = [self._origin(rung, engine) for rung, engine in enumerate(self._engines)]
        self._journal = ReplicaJournal.open(
            job.files, job.system, origins, job.simulate.frames, job.simulate.chunk_frames
        )

    def advance(self) -> ReplicaProgress:
        """Simulate and store one chunk (first of all: equilibrate); writes the summary after the last."""
        begin = time.process_time()
        entry = self._journal.entry
        if entry is None:
            self._commit(equilibrated(self._engines, self._timetable, self._noise, self._together), (), 0.0, begin)
        elif not self._journal.is_complete:
            state, chunk = next_chunk(self._engines, entry.state, self._timetable, self._noise, self._together)
            self._commit(state, chunk, entry.cpu_seconds, begin)
        if self._journal.is_complete:
            self._journal.conclude(self._summary())
        return self.progress()

    def progress(self) -> ReplicaProgress:
        """How far the replica is."""
        entry = self._journal.entry
        return ReplicaProgress(entry.state.frames if entry else 0, self._job.files.summary.is_file())

    def close(self) -> None:
        """Give the replica's files back."""
        self._journal.close()

    def _commit(self, state: LadderState, chunk: Any, spent: float, begin: float) -> None:
        self._journal.commit(Entry(state, spent + time.process_time() - begin, chunk))

    def _origin(self, rung: int, engine: Engine) -> dict[str, Any]:
        job = self._job
        return engine.origin | {
            "program": f"dig-scale {__version__}",
            "seed": job.simulate.seed,
            "recipe_seed": job.recipe_seed,
            "parent": job.label,
            "replica": job.replica,
            "rung": rung,
            "first_frame_ps": job.simulate.frame_spacing_ps,
            "frame_spacing_ps": job.simulate.frame_spacing_ps,
            "system": job.system.origin,
            "recipe": job.simulate.model_dump(mode="json"),
        }

    def _summary(self) -> dict[str, Any]:
        entry, job = self._journal.entry, self._job
        assert entry is not None
        return {
            "format_version": 1,
            "system": job.system.name,
            "replica": job.replica,
            "frames": entry.state.frames,
            "simulated_ns": simulated_ns(job.simulate, entry.state.frames),
            "cpu_seconds": entry.cpu_seconds,
            "temperatures_K": list(job.temperatures),
            "exchange_acceptance": list(entry.state.acceptance) if job.simulate.replica_exchange else [],
            "platform": job.platform,
            "trajectories": [path.name for path in job.files.stores],
        }


def _engines(job: ReplicaJob) -> tuple[list[Any], Advance]:
    """Engines of a replica and how they advance: slabs by ASE, all at once; others by OpenMM, one after the other."""
    if any(job.system.periodic):
        from dig_scale.simulation.ase_engine import advance_together, engines_at

        return engines_at(job.system, job.simulate, job.temperatures), advance_together
    model = stored_or_built(job.files.folder, job.system, job.simulate)
    return [OpenMMEngine(job.system, job.simulate, kelvin, job.platform, model) for kelvin in job.temperatures], in_turn
