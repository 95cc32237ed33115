"""Reference trajectories from disk: a folder or store of our own, or any trajectory file that MDTraj reads.

In: a path, and what is known of the ensemble that is to be compared. Out: ReferenceFrames of one System. Where a folder holds
several systems, those of the ensemble's own system are taken, else those of its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from dig_scale.ensemble import Ensemble
from dig_scale.errors import UserError
from dig_scale.records import (
    find_trajectories,
    read_trajectory_frames,
    read_trajectory_system,
    simulation_cpu_seconds,
    trajectory_origin,
)
from dig_scale.system import Frames, System

ROOM_TEMPERATURE = 300.0
"""K; taken where neither recipe nor trajectories say another."""
_NAMED = 4


@dataclass(frozen=True)
class ReferenceFile:
    """What a trajectory file (not of our own store) does not say: its topology, and its frame spacing in ps."""

    topology: Path
    frame_spacing_ps: float | None = None


@dataclass(frozen=True)
class ReferenceFrames:
    """Reference trajectories of one system at one temperature (K), with what they cost (CPU seconds, if recorded)."""

    system: System
    frames: list[Frames]
    temperature: float
    cpu_seconds: float | None


def target_temperature(ensemble: Ensemble) -> float | None:
    """The temperature (K) that the model of an ensemble was trained at, if its recipe says so."""
    recipe = ensemble.provenance.get("recipe") or {}
    for section in ("pack", "simulate"):
        kelvin = (recipe.get(section) or {}).get("temperature")
        if kelvin is not None:
            return float(kelvin)
    return None


def stored_systems(source: Path) -> dict[Path, System]:
    """The trajectory stores in a folder and the system of each, for those who look for the references of many systems."""
    return {path: read_trajectory_system(path) for path in find_trajectories(source)}


def reference_for(
    ensemble: Ensemble, source: Path, file: ReferenceFile | None, stores: Mapping[Path, System] | None = None
) -> ReferenceFrames:
    """The reference of an ensemble: its system, at its temperature, as residue frames where it has these."""
    from dig_scale.importers.backbone import backbone_of

    found = reference_frames(source, file, target_temperature(ensemble), ensemble.system, stores)
    if ensemble.rotations is None or all(frames.rotations is not None for frames in found.frames):
        return found
    pairs = [backbone_of(found.system, frames) for frames in found.frames]
    return ReferenceFrames(pairs[0][0], [frames for _, frames in pairs], found.temperature, found.cpu_seconds)


def reference_frames(
    source: Path,
    file: ReferenceFile | None,
    temperature: float | None,
    wanted: System | None = None,
    stores: Mapping[Path, System] | None = None,
) -> ReferenceFrames:
    """Trajectories from a folder or file of our own store, or with `file` from one that MDTraj reads; of `wanted`, if given.

    `stores` is stored_systems(source) where the caller has it.
    """
    if not source.exists():
        raise UserError(f"no reference at {source}: give a folder of trajectories, a .zarr, or a trajectory file")
    if file is not None or source.is_file():
        return _from_file(source, file, temperature)
    paths = find_trajectories(source) if wanted is None else _of_system(stores or stored_systems(source), wanted)
    kelvins = {path: trajectory_origin(path).get("temperature_K") for path in paths}
    target = temperature if temperature is not None else _only(set(kelvins.values()), source)
    chosen = [
        path for path, kelvin in kelvins.items() if kelvin is None or target is None or abs(kelvin - target) < 1e-6
    ]
    if not chosen:
        raise UserError(f"{source}: no trajectory at {target} K; found {sorted(map(str, set(kelvins.values())))}")
    read = [read_trajectory_frames(path) for path in chosen]
    names = {system.system_id: system.name for system, _ in read}
    if len(names) > 1:
        listed = ", ".join(list(names.values())[:_NAMED])
        raise UserError(
            f"{source} holds trajectories of {len(names)} systems ({listed}): give the folder of one of them"
        )
    return ReferenceFrames(
        read[0][0], [frames for _, frames in read], target or ROOM_TEMPERATURE, simulation_cpu_seconds(paths)
    )


def _of_system(systems: Mapping[Path, System], wanted: System) -> list[Path]:
    """The stores of a system, else those of its name, else all."""
    named = [path for path, system in systems.items() if system.name == wanted.name]
    own = [path for path in named if systems[path].system_id == wanted.system_id]
    return own or named or list(systems)


def _only(kelvins: set[float | None], source: Path) -> float | None:
    if len(kelvins) > 1:
        raise UserError(f"{source} holds temperatures {sorted(map(str, kelvins))} K: say which with --temperature")
    return next(iter(kelvins))


def _from_file(source: Path, file: ReferenceFile | None, temperature: float | None) -> ReferenceFrames:
    from dig_scale.importers.trajectory import ImportOptions, import_trajectory

    if file is None:
        raise UserError(f"{source} is a trajectory file: give its topology with --topology")
    options = ImportOptions(temperature=temperature, frame_spacing_ps=file.frame_spacing_ps)
    with TemporaryDirectory() as scratch:
        stores = import_trajectory(file.topology, [source], Path(scratch), options)
        read = [read_trajectory_frames(store) for store in stores]
    return ReferenceFrames(read[0][0], [frames for _, frames in read], temperature or ROOM_TEMPERATURE, None)
