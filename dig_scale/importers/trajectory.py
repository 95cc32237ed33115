"""A user's own trajectories -> the stores that generation writes.

In: a topology file, and trajectories in any format MDTraj reads, or NumPy arrays [F, N, 3] whose unit is given. Out: one
Zarr store per trajectory, OUT/<name>/<file stem>.zarr, and the System they share. The reference geometry is the first
frame. Bonds come from the topology file or residue templates; where these leave a residue in pieces, from distances
and covalent radii. Coarse-grained beads are bonded along the chain. Unit cells are used to make molecules whole, then
dropped. Knows no engine.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
from dig_shards.errors import ShardError
from dig_shards.trajectory import TrajectoryWriter

from dig_scale import records
from dig_scale.errors import UserError
from dig_scale.importers import residues
from dig_scale.importers.stores import finished_store
from dig_scale.system import COARSE_GRAINED_BEAD, Frames, System, SystemKind
from dig_scale.units import ANGSTROM_PER_NM, EV_PER_ANGSTROM_PER_KJ_MOL_NM, EV_PER_KCAL_MOL

_FORMATS_WITH_TIME = (".xtc", ".trr", ".h5", ".hdf5", ".nc", ".netcdf", ".ncdf", ".gro", ".tng")
_BOND_TOLERANCE = 0.4
_TIME_TOLERANCE = 1e-3


class Sites(enum.StrEnum):
    """What the sites of a trajectory are."""

    ATOMS = "atoms"
    BEADS = "beads"


class LengthUnit(enum.StrEnum):
    """Unit of positions in a NumPy array."""

    ANGSTROM = "angstrom"
    NANOMETRE = "nanometre"


class ForceUnit(enum.StrEnum):
    """Unit of forces in a NumPy array."""

    EV_PER_ANGSTROM = "eV/angstrom"
    KCAL_PER_MOL_ANGSTROM = "kcal/mol/angstrom"
    KJ_PER_MOL_NANOMETRE = "kJ/mol/nanometre"


_ANGSTROM = {LengthUnit.ANGSTROM: 1.0, LengthUnit.NANOMETRE: ANGSTROM_PER_NM}
_EV_PER_ANGSTROM = {
    ForceUnit.EV_PER_ANGSTROM: 1.0,
    ForceUnit.KCAL_PER_MOL_ANGSTROM: EV_PER_KCAL_MOL,
    ForceUnit.KJ_PER_MOL_NANOMETRE: EV_PER_ANGSTROM_PER_KJ_MOL_NM,
}


@dataclass(frozen=True)
class ImportOptions:
    """What the files do not say.

    temperature in K, if known; name of the system (default: the topology file's); frame_spacing_ps where the format has no times;
    length_unit for .npy positions; forces: .npy files, one per trajectory, with force_unit; selection: an MDTraj atom
    selection such as "protein", applied to topology and trajectories alike.
    """

    temperature: float | None = None
    name: str | None = None
    sites: Sites = Sites.ATOMS
    length_unit: LengthUnit | None = None
    forces: tuple[Path, ...] = ()
    force_unit: ForceUnit | None = None
    frame_spacing_ps: float | None = None
    selection: str | None = None
    chunk_frames: int = 250


def import_trajectory(topology: Path, trajectories: Sequence[Path], out: Path, options: ImportOptions) -> list[Path]:
    """Write one store per trajectory below `out` and return their paths; raises UserError naming the file.

    A store that is already complete with the same origin is left as it is; a half-written one is written again.
    """
    _check_options(trajectories, options)
    full = _load_topology(topology, options)
    chosen = _selected(full, options)
    name = options.name or topology.stem
    first = _first_frame(trajectories[0], full, chosen, options)
    system = _system(name, full.subset(chosen), first, options)
    system = replace(system, origin={"source": topology.name, "sites": str(options.sites)})
    paths = []
    for number, path in enumerate(trajectories):
        forces = options.forces[number] if options.forces else None
        store = out / name / f"{_unique_stem(trajectories, number)}.zarr"
        _write_store(store, system, _Source(path, forces, full, chosen, options))
        paths.append(store)
    return paths


@dataclass(frozen=True)
class _Source:
    """One trajectory to read: files, the topology it follows, and the chosen atoms."""

    path: Path
    forces: Path | None
    topology: mdtraj.Topology
    chosen: np.ndarray
    options: ImportOptions

    def frames(self) -> Iterator[Frames]:
        """Frames chunk by chunk, in Å, eV/Å and ps counted from the first frame."""
        pieces = self._arrays() if self.path.suffix == ".npy" else self._files()
        forces = None if self.forces is None else _load_array(self.forces, self.topology.n_atoms)
        done = 0
        for positions in pieces:
            stop = done + len(positions)
            if forces is not None and len(forces) < stop:
                raise UserError(
                    f"{self.forces}: {len(forces)} frames of forces, {self.path} has more; give matching files"
                )
            yield Frames(positions, np.arange(done, stop, dtype=float), None, self._force_values(forces, done, stop))
            done = stop
        if forces is not None and len(forces) != done:
            raise UserError(
                f"{self.forces}: {len(forces)} frames of forces, {self.path} has {done}; give matching files"
            )

    def _force_values(self, forces: np.ndarray | None, start: int, stop: int) -> np.ndarray | None:
        if forces is None or self.options.force_unit is None:
            return None
        return np.asarray(forces[start:stop, self.chosen], float) * _EV_PER_ANGSTROM[self.options.force_unit]

    def _arrays(self) -> Iterator[np.ndarray]:
        array = _load_array(self.path, self.topology.n_atoms)
        scale = _ANGSTROM[self.options.length_unit or LengthUnit.ANGSTROM]
        for start in range(0, len(array), self.options.chunk_frames):
            yield np.asarray(array[start : start + self.options.chunk_frames][:, self.chosen], float) * scale

    def _files(self) -> Iterator[np.ndarray]:
        for piece in _mdtraj_pieces(self.path, self.topology, self.options.chunk_frames):
            part = piece.atom_slice(self.chosen)
            if part.unitcell_lengths is not None and part.topology.n_bonds:
                part = part.make_molecules_whole()
            yield np.asarray(part.xyz, float) * ANGSTROM_PER_NM


def _check_options(trajectories: Sequence[Path], options: ImportOptions) -> None:
    arrays = [path for path in trajectories if path.suffix == ".npy"]
    if not trajectories:
        raise UserError("no trajectory given: name at least one file")
    if arrays and options.length_unit is None:
        units = " or ".join(LengthUnit)
        raise UserError(f"{arrays[0]}: a NumPy array does not say its unit; give the length unit, {units}")
    if options.forces and options.force_unit is None:
        raise UserError(
            f"{options.forces[0]}: a NumPy array does not say its unit; give the force unit, {' or '.join(ForceUnit)}"
        )
    if options.forces and len(options.forces) != len(trajectories):
        raise UserError(f"{len(options.forces)} files of forces for {len(trajectories)} trajectories; give one each")
    for path in (*trajectories, *options.forces):
        if not path.is_file():
            raise UserError(f"no file at {path}")
    timeless = [path for path in trajectories if path.suffix.lower() not in _FORMATS_WITH_TIME]
    if timeless and options.frame_spacing_ps is None:
        raise UserError(f"{timeless[0]}: this format holds no times; give the frame spacing in ps")
    if options.temperature is not None and options.temperature <= 0:
        raise UserError(
            f"temperature {options.temperature} K: expected the temperature the trajectory was made at, above 0"
        )


def _load_topology(path: Path, options: ImportOptions) -> mdtraj.Topology:
    if not path.is_file():
        raise UserError(f"no topology file at {path}")
    # Beads keep the names of the file: they are no atoms whose names have a standard.
    keep_names = {"standard_names": False} if path.suffix == ".pdb" and options.sites is Sites.BEADS else {}
    try:
        return mdtraj.load_topology(str(path), **keep_names)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: MDTraj cannot read a topology from it: {error}") from error


def _selected(topology: mdtraj.Topology, options: ImportOptions) -> np.ndarray:
    if options.selection is None:
        return np.arange(topology.n_atoms)
    try:
        chosen = topology.select(options.selection)
    except (ValueError, SyntaxError) as error:
        raise UserError(f"selection {options.selection!r} is not in MDTraj's language: {error}") from error
    if not len(chosen):
        raise UserError(f"selection {options.selection!r} matches none of {topology.n_atoms} sites")
    return np.asarray(chosen)


def _load_array(path: Path, n_sites: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a NumPy array file: {error}") from error
    if array.ndim != 3 or array.shape[1:] != (n_sites, 3) or not len(array):
        raise UserError(f"{path}: shape {array.shape}, expected (frames, {n_sites}, 3) as in the topology")
    return array


def _mdtraj_pieces(path: Path, topology: mdtraj.Topology, chunk: int) -> Iterator[mdtraj.Trajectory]:
    with_topology = {} if path.suffix.lower() in (".pdb", ".h5", ".hdf5", ".gro") else {"top": topology}
    try:
        for piece in mdtraj.iterload(str(path), chunk=chunk, **with_topology):
            if piece.n_atoms != topology.n_atoms:
                raise UserError(
                    f"{path}: {piece.n_atoms} sites, the topology has {topology.n_atoms}; give matching files"
                )
            yield piece
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: MDTraj cannot read it with this topology ({topology.n_atoms} sites): {error}"
        ) from error


def _first_frame(path: Path, topology: mdtraj.Topology, chosen: np.ndarray, options: ImportOptions) -> np.ndarray:
    source = _Source(path, None, topology, chosen, replace(options, chunk_frames=1))
    first = next(source.frames(), None)
    if first is None or not first.n_frames:
        raise UserError(f"{path}: holds no frames")
    if not np.isfinite(first.positions[0]).all():
        raise UserError(f"{path}: frame 0 has positions that are not finite; drop it")
    return np.asarray(first.positions[0])


def _system(name: str, topology: mdtraj.Topology, positions: np.ndarray, options: ImportOptions) -> System:
    listed = list(topology.atoms)
    chain_index = np.array([atom.residue.chain.index for atom in listed])
    beads = options.sites is Sites.BEADS
    elements = np.array([COARSE_GRAINED_BEAD if beads else _atomic_number(atom) for atom in listed])
    named = residues.NamedAtoms(
        elements=elements,
        atom_names=tuple(atom.name for atom in listed),
        residue_names=tuple(atom.residue.name for atom in listed),
        residue_index=np.array([atom.residue.index for atom in listed]),
        bonds=_chain_bonds(chain_index) if beads else _atom_bonds(topology, elements, positions),
    )
    orders = np.zeros(len(named.bonds), int) if beads else residues.bond_orders(named)
    return System(
        name=name,
        kind=SystemKind.MOLECULE,
        elements=elements,
        atom_names=named.atom_names,
        residue_names=named.residue_names,
        residue_index=named.residue_index,
        chain_index=chain_index,
        bonds=named.bonds,
        bond_orders=orders,
        formal_charges=np.zeros(len(listed), int) if beads else residues.formal_charges(named, orders),
        stereocentres=residues.stereocentres(named, positions),
        mobile=np.ones(len(listed), dtype=bool),
        reference_positions=positions,
    )


def _atomic_number(atom: Any) -> int:
    return 0 if atom.element is None else int(atom.element.atomic_number)


def _chain_bonds(chain_index: np.ndarray) -> np.ndarray:
    sites = np.arange(len(chain_index) - 1)
    together = chain_index[:-1] == chain_index[1:]
    return np.stack([sites[together], sites[together] + 1], axis=1).reshape(-1, 2)


def _atom_bonds(topology: mdtraj.Topology, elements: np.ndarray, positions: np.ndarray) -> np.ndarray:
    known = {tuple(sorted((bond[0].index, bond[1].index))) for bond in topology.bonds}
    for residue in topology.residues:
        members = [atom.index for atom in residue.atoms]
        if not _is_connected(members, known):
            known |= _contacts(members, elements, positions)
    return np.array(sorted(known), dtype=np.int64).reshape(-1, 2)


def _is_connected(members: Sequence[int], bonds: set[tuple[int, ...]]) -> bool:
    inside = set(members)
    neighbours: dict[int, list[int]] = {i: [] for i in members}
    for i, j in bonds:
        if i in inside and j in inside:
            neighbours[i].append(j)
            neighbours[j].append(i)
    reached, frontier = {members[0]}, [members[0]]
    while frontier:
        new = [j for j in neighbours[frontier.pop()] if j not in reached]
        reached.update(new)
        frontier.extend(new)
    return len(reached) == len(members)


def _contacts(members: Sequence[int], elements: np.ndarray, positions: np.ndarray) -> set[tuple[int, ...]]:
    """Pairs within a residue closer than the sum of their covalent radii and a tolerance (as Open Babel perceives bonds)."""
    from rdkit.Chem import GetPeriodicTable

    radius = {int(z): float(GetPeriodicTable().GetRcovalent(int(z))) for z in np.unique(elements[list(members)])}
    found: set[tuple[int, ...]] = set()
    for i, j in itertools.combinations(sorted(members), 2):
        distance = float(np.linalg.norm(positions[i] - positions[j]))
        both_hydrogen = elements[i] == 1 and elements[j] == 1
        if not both_hydrogen and distance < radius[int(elements[i])] + radius[int(elements[j])] + _BOND_TOLERANCE:
            found.add((i, j))
    return found


def _write_store(store: Path, system: System, source: _Source) -> None:
    attributes = records.trajectory_attributes(system, _origin(source))
    if finished_store(store, attributes) is not None:
        return
    chunk_frames = source.options.chunk_frames
    names = (records.POSITIONS, *((records.FORCES,) if source.forces else ()))
    try:
        with TrajectoryWriter.create(
            store, records.field_specs(system.n_sites, names), attributes, chunk_frames
        ) as writer:
            for chunk in source.frames():
                if chunk.n_frames == chunk_frames:
                    writer.append_chunk(records.frame_arrays(chunk))
                else:
                    writer.finish(records.frame_arrays(chunk))
            if not writer.is_finished:
                writer.finish()
    except ShardError as error:
        raise UserError(f"{source.path}: {error}") from error


def _origin(source: _Source) -> dict[str, Any]:
    options = source.options
    spacing = options.frame_spacing_ps if options.frame_spacing_ps is not None else _spacing_in_file(source)
    return {
        "engine": "imported",
        "source": source.path.name,
        "forces": source.forces.name if source.forces else None,
        "temperature_K": options.temperature,
        "first_frame_ps": 0.0,
        "frame_spacing_ps": spacing,
        "selection": options.selection,
        "sites": str(options.sites),
    }


def _spacing_in_file(source: _Source) -> float:
    times = np.concatenate([p.time for p in _mdtraj_pieces(source.path, source.topology, source.options.chunk_frames)])
    steps = np.diff(times.astype(float))
    if not len(steps) or steps[0] <= 0 or np.abs(steps - steps[0]).max() > _TIME_TOLERANCE * abs(steps[0]) + 1e-3:
        raise UserError(f"{source.path}: its frame times are not evenly spaced; give the frame spacing in ps")
    return float(steps[0])


def _unique_stem(trajectories: Sequence[Path], number: int) -> str:
    stem = trajectories[number].stem
    twins = [k for k, path in enumerate(trajectories) if path.stem == stem]
    return stem if len(twins) == 1 else f"{stem}-{twins.index(number)}"
