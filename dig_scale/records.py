"""System and Frames <-> dig_shards: the only place where names, dtypes and units of stored fields are listed.

In: Systems and Frames. Out: trajectory stores, packed datasets, and files for trajectory viewers; and back. A trajectory
store carries in its attributes `system_id`, `system` (System.to_dict) and `origin` (what made it: at least temperature_K,
first_frame_ps, frame_spacing_ps). Knows neither engines nor models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from dig_shards.errors import ShardError
from dig_shards.fields import FieldSpec
from dig_shards.manifest import Manifest, load_manifest
from dig_shards.plan import PackPlan, SplitBy, TrajectorySource
from dig_shards.reader import ShardReader
from dig_shards.trajectory import TrajectoryReader

from dig_scale.config import Pack, Recipe
from dig_scale.errors import UserError
from dig_scale.system import COARSE_GRAINED_BEAD, Frames, System
from dig_scale.units import ANGSTROM_PER_NM

if TYPE_CHECKING:
    import mdtraj

POSITIONS = "positions"
ENERGY = "energy"
FORCES = "forces"
ROTATIONS = "rotations"
CELL = "cell"
NOISED = "noised"
PER_SITE = (POSITIONS, FORCES, ROTATIONS, NOISED)
_OPTIONAL = (ENERGY, FORCES, ROTATIONS, CELL, NOISED)
LABEL = "label_"
"""A property of a frame is stored as LABEL + its name."""
NOISE_STD = "noise_std"
"""Label of frames that have noised structures: the noise in Å."""
MISSING_LABEL = float(np.finfo(np.float64).max)
"""Stands in stores for a property that is not known of a frame (NaN in Frames); no number in fp32."""

POSITION_GRID = 1e-4
"""Å; fine enough that stored energies and forces still belong to the stored positions."""

_TEMPERATURE_TOLERANCE = 0.01
_BLOCK_FRAMES = 256
_BLOCKS_PER_SPLIT = 4

PackProgress = Callable[[int, int], None]


def evenly_spread(count: int, at_most: int) -> np.ndarray:
    """Indices [n] int64 of at most so many of `count` frames, evenly spread, first and last among them."""
    return np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64)


def field_specs(n_sites: int, names: Sequence[str]) -> tuple[FieldSpec, ...]:
    """Declarations of `names` that frames may have for a system of `n_sites`; raises UserError on another."""
    known = {
        POSITIONS: FieldSpec(POSITIONS, (n_sites, 3), "int32", POSITION_GRID, "angstrom"),
        ENERGY: FieldSpec(ENERGY, (), "float64", None, "eV"),
        FORCES: FieldSpec(FORCES, (n_sites, 3), "float32", None, "eV/angstrom"),
        ROTATIONS: FieldSpec(ROTATIONS, (n_sites, 3, 3), "float32", None, "1"),
        CELL: FieldSpec(CELL, (3, 3), "float64", None, "angstrom"),
        NOISED: FieldSpec(NOISED, (n_sites, 3), "int32", POSITION_GRID, "angstrom"),
    }
    known |= {name: FieldSpec(name, (), "float64", None, "of the label") for name in names if name.startswith(LABEL)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"no field {unknown[0]!r}: known fields are {', '.join(known)}")
    return tuple(known[name] for name in names)


def field_names(frames: Frames) -> tuple[str, ...]:
    """The stored fields that these frames can fill."""
    optional = {name: getattr(frames, name) for name in _OPTIONAL}
    labels = (LABEL + name for name in sorted(frames.labels))
    return (POSITIONS, *(name for name, values in optional.items() if values is not None), *labels)


def frame_arrays(frames: Frames) -> dict[str, np.ndarray]:
    """Arrays to store, by field name: positions [F, N, 3] Å and, where known, energy [F] eV and forces [F, N, 3] eV/Å;
    labels [F] with MISSING_LABEL for NaN."""
    labels = {LABEL + name: np.where(np.isnan(v), MISSING_LABEL, v) for name, v in frames.labels.items()}
    return {name: labels[name] if name in labels else getattr(frames, name) for name in field_names(frames)}


def trajectory_attributes(system: System, origin: dict[str, Any]) -> dict[str, Any]:
    """What a trajectory store says of itself; `origin` names temperature_K, first_frame_ps and frame_spacing_ps."""
    return {"system_id": system.system_id, "system": system.to_dict(), "origin": origin}


def find_trajectories(folder: Path) -> list[Path]:
    """All trajectory stores in or below `folder`, or `folder` itself if it is one, sorted; raises UserError if none."""
    if folder.suffix == ".zarr" and (folder / "zarr.json").is_file():
        return [folder]
    found = sorted(path.parent for path in folder.rglob("*.zarr/zarr.json"))
    if not found:
        raise UserError(f"no trajectories (*.zarr) in {folder}: run `dig-scale simulate` or `dig-scale import` first")
    return found


def read_trajectory_system(path: Path) -> System:
    """The System of a trajectory store; raises UserError naming the store."""
    attributes = _open(path).attributes
    if "system" not in attributes:
        raise UserError(f"{path}: holds no system; it was not written by dig-scale")
    return System.from_dict(attributes["system"])


def read_trajectory_frames(path: Path) -> tuple[System, Frames]:
    """The System and all committed Frames of a trajectory store; raises UserError naming the store."""
    reader = _open(path)
    system = read_trajectory_system(path)
    count, origin = reader.n_frames, reader.attributes["origin"]
    values = {spec.name: _read(reader, spec.name) for spec in reader.fields}
    time_ps = origin["first_frame_ps"] + origin["frame_spacing_ps"] * np.arange(count)
    labels = {name.removeprefix(LABEL): _known_labels(v) for name, v in values.items() if name.startswith(LABEL)}
    optional = {name: values.get(name) for name in _OPTIONAL}
    return system, Frames(values[POSITIONS], time_ps, **optional, labels=labels)


def _known_labels(stored: np.ndarray) -> np.ndarray:
    return np.where(stored == MISSING_LABEL, np.nan, stored)


def trajectory_origin(path: Path) -> dict[str, Any]:
    """What made a trajectory store: temperature_K, frame_spacing_ps, first_frame_ps, engine, seed, ..."""
    return dict(_open(path).attributes.get("origin", {}))


def simulation_summary_path(trajectory: Path) -> Path:
    """Where the campaign records what the replica of a trajectory store cost; a ladder's stores share one record."""
    return trajectory.with_name(re.sub(r"(-[TW][0-9.]+)?\.zarr$", ".json", trajectory.name))


def simulation_cpu_seconds(trajectories: Sequence[Path]) -> float | None:
    """CPU seconds of MD behind these stores, all temperatures of a ladder included; None if any was not recorded."""
    records = {simulation_summary_path(path) for path in trajectories}
    if not records or not all(record.is_file() for record in records):
        return None
    return sum(float(json.loads(record.read_text())["cpu_seconds"]) for record in records)


def dataset_systems(dataset: Path) -> list[System]:
    """The Systems of a packed dataset, in its order (as ShardReader numbers them); raises UserError naming the folder."""
    try:
        manifest = load_manifest(dataset)
        split = next(name for name, rows in manifest.shards.items() if rows)
        reader = ShardReader(dataset, split)
        return [System.from_json(reader.sidecar(number)) for number in range(len(manifest.systems))]
    except ShardError as error:
        raise UserError(f"{error}; pack it with `dig-scale pack`") from error


def pack_dataset(recipe: Recipe, folders: Sequence[Path], out: Path, progress: PackProgress | None = None) -> Manifest:
    """Pack the trajectories below `folders` that are at the recipe's temperature into the dataset `out`.

    Heavy atoms alone if `recipe.pack` says so; energy and forces go along only with all atoms, to which they belong.
    Raises UserError when no trajectory is at that temperature or the store refuses.
    """
    from dig_shards.pack import pack

    plan = recipe.pack or Pack()
    chosen = [_chosen(path, name, plan) for path, name in _at_temperature(recipe, plan, folders)]
    sidecars = {one.system.system_id: one.system.to_json() for one in chosen}
    try:
        return pack([one.source for one in chosen], out, _pack_plan(recipe.name, plan, chosen), sidecars, progress)
    except ShardError as error:
        raise UserError(str(error)) from error


def packed_system(system: System, plan: Pack | None) -> System:
    """What a model trained on datasets of this plan sees of a system: all of it, or its heavy atoms alone."""
    return system.select(system.heavy_sites()) if plan is not None and plan.atoms == "heavy" else system


@dataclass(frozen=True)
class _Chosen:
    """A trajectory to pack: its source and the System of the sites that are kept."""

    source: TrajectorySource
    system: System
    n_frames: int
    fields: tuple[str, ...]


def _chosen(path: Path, name: str, plan: Pack) -> _Chosen:
    reader = _open(path)
    system = read_trajectory_system(path)
    drawn = -(-reader.n_frames // plan.stride)
    if plan.atoms != "heavy":
        fields = tuple(spec.name for spec in reader.fields)
        return _Chosen(TrajectorySource(path, stride=plan.stride, name=name), system, drawn, fields)
    sites = system.heavy_sites()
    kept = system.select(sites)
    rows = {POSITIONS: tuple(int(site) for site in sites)}
    source = TrajectorySource(path, stride=plan.stride, name=name, rows=rows, system=kept.system_id)
    return _Chosen(source, kept, drawn, (POSITIONS,))


def _at_temperature(recipe: Recipe, plan: Pack, folders: Sequence[Path]) -> list[tuple[Path, str]]:
    target = plan.temperature or (recipe.simulate.temperature if recipe.simulate else None)
    found = [
        (path, _label(path, folder, k, len(folders)))
        for k, folder in enumerate(folders)
        for path in find_trajectories(folder)
    ]
    held = [trajectory_origin(path).get("temperature_K") for path, _ in found]
    if target is None and len({*held}) > 1:
        raise UserError(
            f"trajectories at several temperatures ({_listed(held)} K): set pack.temperature to one of them"
        )
    kept = [row for row, kelvin in zip(found, held, strict=True) if target is None or _equal(kelvin, target)]
    if not kept:
        raise UserError(f"no trajectory at {target:g} K: found {_listed(held)} K; set pack.temperature")
    filled = [row for row in kept if _open(row[0]).n_frames > 0]
    if not filled:
        raise UserError(f"{kept[0][0]} and {len(kept) - 1} others hold no frames yet; let the simulation go on first")
    return filled


def _equal(kelvin: float | None, target: float) -> bool:
    return kelvin is not None and abs(kelvin - target) <= _TEMPERATURE_TOLERANCE


def _listed(temperatures: Sequence[float | None]) -> str:
    return ", ".join(sorted({"unknown" if kelvin is None else f"{kelvin:g}" for kelvin in temperatures}))


def _label(path: Path, folder: Path, number: int, folders: int) -> str:
    relative = path.relative_to(folder).as_posix() if path != folder else path.name
    name = relative.removesuffix(".zarr")
    return name if folders == 1 else f"{number}:{name}"


def _pack_plan(recipe_name: str, plan: Pack, chosen: Sequence[_Chosen]) -> PackPlan:
    common = [name for name in chosen[0].fields if all(name in one.fields for one in chosen)]
    total = sum(one.n_frames for one in chosen)
    # Short sets get shorter blocks, so that validation still holds several stretches of time.
    block = int(np.clip(total * plan.validation_fraction / _BLOCKS_PER_SPLIT, 1, _BLOCK_FRAMES))
    return PackPlan(
        name=re.sub(r"[^A-Za-z0-9_-]", "-", recipe_name).lstrip("-_")[:48] or "dataset",
        fields=tuple(common),
        frames_per_member=plan.frames_per_member,
        members_per_shard=plan.members_per_shard,
        validation_fraction=plan.validation_fraction,
        split_by=SplitBy(plan.split_by),
        block_frames=block,
        seed=plan.seed,
    )


def mdtraj_topology(system: System) -> mdtraj.Topology:
    """MDTraj topology with the same atoms, residues, chains and bonds; beads become virtual sites."""
    import mdtraj
    from mdtraj.core.topology import Double, Single, Triple

    topology = mdtraj.Topology()
    chains: dict[int, Any] = {}
    found: dict[int, Any] = {}
    atoms = []
    for i in range(system.n_sites):
        chain, residue, number = int(system.chain_index[i]), int(system.residue_index[i]), int(system.elements[i])
        if chain not in chains:
            chains[chain] = topology.add_chain()
        if residue not in found:
            found[residue] = topology.add_residue(system.residue_names[i], chains[chain], resSeq=residue + 1)
        element = _mdtraj_element(number)
        atoms.append(topology.add_atom(system.atom_names[i], element, found[residue]))
    kinds = {1: Single, 2: Double, 3: Triple}
    for (i, j), order in zip(system.bonds, system.bond_orders, strict=True):
        topology.add_bond(
            atoms[i], atoms[j], type=kinds.get(int(order)), order=int(order) if int(order) in kinds else None
        )
    return topology


def _mdtraj_element(number: int) -> Any:
    import mdtraj

    if number == COARSE_GRAINED_BEAD:
        return mdtraj.element.virtual
    return mdtraj.element.Element.getByAtomicNumber(number)


def write_topology_pdb(system: System, positions: np.ndarray, path: Path) -> Path:
    """Write one conformation, positions [N, 3] Å, as PDB with all bonds; returns the path."""
    return _write_with_mdtraj(system, positions[None], path, ".pdb")


def write_xtc(system: System, positions: np.ndarray, path: Path) -> Path:
    """Write conformations, positions [S, N, 3] Å, as XTC (grid 0.01 Å); returns the path."""
    return _write_with_mdtraj(system, positions, path, ".xtc")


def _write_with_mdtraj(system: System, positions: np.ndarray, path: Path, suffix: str) -> Path:
    import mdtraj

    if positions.ndim != 3 or positions.shape[1:] != (system.n_sites, 3):
        raise UserError(f"{path}: positions {positions.shape}, expected (..., {system.n_sites}, 3) for {system.name!r}")
    trajectory = mdtraj.Trajectory(np.asarray(positions, np.float32) / ANGSTROM_PER_NM, mdtraj_topology(system))
    path.parent.mkdir(parents=True, exist_ok=True)
    # MDTraj chooses the format by suffix, so the temporary name keeps it; the rename makes the file whole or absent.
    temporary = path.with_name(f".{path.stem}.tmp{suffix}")
    trajectory.save(str(temporary))
    temporary.replace(path)
    return path


def _open(path: Path) -> TrajectoryReader:
    try:
        return TrajectoryReader(path)
    except ShardError as error:
        raise UserError(str(error)) from error


def _read(reader: TrajectoryReader, name: str) -> np.ndarray:
    try:
        return reader.read(name, 0, reader.n_frames)
    except ShardError as error:
        raise UserError(str(error)) from error
