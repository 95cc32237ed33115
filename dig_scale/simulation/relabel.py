"""Energies and forces of stored frames computed again by a better method.

In: trajectory stores, the frames chosen from each, a CalculatorSpec. Out: OUT/<system>/<name>.zarr with the same positions
and the new numbers; the origin says which method gave each of them and which frames they are. One Ray worker works on one
store at a time and commits chunk after chunk: a killed worker is tried again and goes on from its last chunk, as does a
second call. A frame that cannot be computed ends its store with an error that names it; the other stores go on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from dig_shards.errors import ShardError
from dig_shards.trajectory import TrajectoryReader, TrajectoryWriter

from dig_scale import records
from dig_scale.config import CalculatorSpec
from dig_scale.errors import UserError
from dig_scale.simulation.ase_engine import CalculatorPotential
from dig_scale.simulation.calculators import method_of
from dig_scale.simulation.campaign import cluster
from dig_scale.simulation.engine import SimulationError
from dig_scale.system import System

_TRIES_AFTER_DEATHS = 3


@dataclass(frozen=True)
class ChosenFrames:
    """Frames of one trajectory store, as ascending indices."""

    store: Path
    frames: tuple[int, ...]


@dataclass(frozen=True)
class RelabelOptions:
    """Frames per chunk, the unit that a killed worker goes on from; workers at a time (one per core when absent)."""

    chunk_frames: int = 8
    actors: int | None = None


def every(store: Path, stride: int) -> ChosenFrames:
    """Every `stride`-th frame of a store."""
    return ChosenFrames(store, tuple(range(0, TrajectoryReader(store).n_frames, stride)))


def relabel(
    chosen: Sequence[ChosenFrames], spec: CalculatorSpec, out: Path, options: RelabelOptions | None = None
) -> list[Path]:
    """Compute all chosen frames with the calculator of `spec`; returns the new stores, in the order of `chosen`.

    Complete stores with the same origin are left as they are. Raises UserError for choices that do not fit their store,
    SimulationError at the end when any store failed.
    """
    settings = options or RelabelOptions()
    jobs = [_job(one, spec, out, settings) for one in chosen]
    if len({job.target for job in jobs}) != len(jobs):
        raise UserError("two chosen stores have the same system and name; relabel them into different folders")
    failures: list[str] = []
    with cluster(settings.actors, len(jobs)):
        task = ray.remote(_run).options(num_cpus=1, max_retries=_TRIES_AFTER_DEATHS)
        for job, pending in [(job, task.remote(job)) for job in jobs]:
            try:
                ray.get(pending)
            except ray.exceptions.RayTaskError as error:
                failures.append(f"{job.chosen.store}: {type(error.cause).__name__}: {error.cause}")
            except ray.exceptions.WorkerCrashedError as error:
                failures.append(f"{job.chosen.store}: its process died again and again: {str(error).splitlines()[0]}")
    if failures:
        raise SimulationError(f"{len(failures)} of {len(jobs)} stores failed, the first with: {failures[0]}")
    return [job.target for job in jobs]


@dataclass(frozen=True)
class RelabelJob:
    """One store to compute: what, with which method, where to."""

    chosen: ChosenFrames
    system: System
    spec: CalculatorSpec
    target: Path
    origin: dict[str, Any]
    chunk_frames: int


def _job(chosen: ChosenFrames, spec: CalculatorSpec, out: Path, options: RelabelOptions) -> RelabelJob:
    system, count = records.read_trajectory_system(chosen.store), TrajectoryReader(chosen.store).n_frames
    frames = np.array(chosen.frames, np.int64)
    if not len(frames) or frames[0] < 0 or frames[-1] >= count or (np.diff(frames) <= 0).any():
        raise UserError(
            f"{chosen.store}: expected ascending frames from 0 to {count - 1}, found {frames[:5].tolist()}..."
        )
    old = records.trajectory_origin(chosen.store)
    method = method_of(spec, system).origin
    origin = _timed(old, frames) | {
        "engine": "relabelled",
        "temperature_K": old.get("temperature_K"),
        "positions": {"store": chosen.store.name, "frames": list(chosen.frames), "origin": old},
        "energy": method,
        "forces": method,
        "calculator": spec.model_dump(mode="json"),
    }
    return RelabelJob(chosen, system, spec, out / system.name / chosen.store.name, origin, options.chunk_frames)


def _timed(old: dict[str, Any], frames: np.ndarray) -> dict[str, Any]:
    """Time of the first frame and the mean spacing of the chosen ones, in ps."""
    spacing = float(old["frame_spacing_ps"])
    strides = np.diff(frames)
    return {
        "first_frame_ps": float(old["first_frame_ps"]) + spacing * int(frames[0]),
        "frame_spacing_ps": spacing * (float(strides.mean()) if len(strides) else 1.0),
    }


def _run(job: RelabelJob) -> None:
    with _opened(job) as writer:
        if writer.is_finished:
            return
        potential = CalculatorPotential(job.system, job.spec)
        reader = TrajectoryReader(job.chosen.store)
        compute = functools.partial(_computed, job, potential, reader)
        while (left := job.chosen.frames[writer.n_frames :]) and len(left) > job.chunk_frames:
            writer.append_chunk(compute(left[: job.chunk_frames]))
        writer.finish(compute(left) if left else None)


def _opened(job: RelabelJob) -> TrajectoryWriter:
    attributes = records.trajectory_attributes(job.system, job.origin)
    if not job.target.is_dir():
        names = (records.POSITIONS, records.ENERGY, records.FORCES)
        return TrajectoryWriter.create(
            job.target, records.field_specs(job.system.n_sites, names), attributes, job.chunk_frames
        )
    if TrajectoryReader(job.target).attributes != attributes:
        raise ShardError(f"{job.target} holds other frames or another method; choose another folder, or remove it")
    return TrajectoryWriter.resume(job.target)


def _computed(
    job: RelabelJob, potential: CalculatorPotential, reader: TrajectoryReader, frames: Sequence[int]
) -> dict[str, np.ndarray]:
    positions = np.concatenate([reader.read(records.POSITIONS, k, k + 1) for k in frames])
    energy, forces = np.empty(len(frames)), np.empty(positions.shape)
    for row, frame in enumerate(frames):
        try:
            one = potential.energy_and_forces(positions[row : row + 1].astype(float))
        except SimulationError as error:
            raise SimulationError(f"frame {frame}: {error}") from error
        energy[row], forces[row] = one[0][0], one[1][0]
        if not (np.isfinite(energy[row]) and np.isfinite(forces[row]).all()):
            raise SimulationError(f"frame {frame}: energy {energy[row]} eV or forces that are not finite")
    return {records.POSITIONS: positions, records.ENERGY: energy, records.FORCES: forces}
