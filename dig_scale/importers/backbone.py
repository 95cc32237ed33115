"""Protein structures -> residue frames: a PROTEIN System and Frames(positions of CA, rotations); and back to atoms.

In: PDB or mmCIF files (also .gz) of one sequence, any trajectory MDTraj reads, or an all-atom System with its Frames. Every
model of a file is a frame. Residues are matched by chain order and residue number; only those with N, CA and C in every frame
are kept. What was left out or replaced stands in the System's origin: `left_out`, `replaced`, `differences`.
The System's reference positions are an extended chain, so that nothing of the fold is in the descriptor. Positions in Å.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dig_scale.errors import InvalidSystemError, UserError
from dig_scale.geometry.rotations import BACKBONE_ATOMS, backbone_from_frames, frames_from_backbone, is_well_formed
from dig_scale.importers import residues
from dig_scale.importers.backbone_file import (
    ATOMS,
    NO_RESIDUES,
    BackboneModel,
    BackboneOptions,
    Differences,
    Place,
    parent_name,
    read_models,
)
from dig_scale.importers.representations import represented
from dig_scale.system import COARSE_GRAINED_BEAD, Frames, System, SystemKind
from dig_scale.units import ANGSTROM_PER_NM

_LONGEST_PEPTIDE_BOND = 2.0
_CA_SPACING = 3.8
_EXTENDED_RISE = 3.4
_CHAIN_SPACING = 20.0
_ELEMENTS = {"N": 7, "CA": 6, "C": 6, "O": 8, "CB": 6}
_LISTED = 5


def read_backbone(name: str, paths: Sequence[Path], options: BackboneOptions | None = None) -> tuple[System, Frames]:
    """System and Frames of PDB or mmCIF files of one sequence, one frame per model, time_ps the frame's number.

    Raises UserError naming the file and its line or residue.
    """
    if not paths:
        raise UserError(f"system {name!r}: no structure given; name at least one PDB or mmCIF file")
    chosen = options or BackboneOptions()
    models = [model for path in paths for model in read_models(path, chosen)]
    kept, missing = _common(name, models)
    names, differing = _agreed_names(name, models, kept, chosen)
    atoms = np.stack([_atoms_at(model, kept) for model in models])
    origin = {
        "source": [path.name for path in paths],
        "left_out": _unique([line for model in models for line in model.left_out] + missing),
        "replaced": _unique([line for model in models for line in model.replaced]),
        "differences": differing,
    }
    system, frames = _assembled(name, kept, names, atoms, np.arange(len(models), dtype=float), origin)
    return _represented(system, chosen.representations), frames


def backbone_of(system: System, frames: Frames) -> tuple[System, Frames]:
    """System and Frames of the residues of an all-atom system, by its atoms' names; time and labels are kept.

    Raises UserError where there is no residue, InvalidSystemError naming frame and residue where positions are not finite.
    """
    members: dict[tuple[int, int], dict[str, int]] = {}
    for site, key in enumerate(zip(system.chain_index.tolist(), system.residue_index.tolist(), strict=True)):
        members.setdefault(key, {}).setdefault(system.atom_names[site], site)
    listed = [
        (Place(chain, residue + 1), system.residue_names[next(iter(atoms.values()))], atoms)
        for (chain, residue), atoms in members.items()
    ]
    origin = {"source": system.name, "system_id": system.system_id}
    places, names, sites, more = _chosen_sites(system.name, listed)
    atoms = np.asarray(frames.positions, float)[:, sites]
    return _assembled(system.name, places, names, atoms, frames.time_ps, origin | more, dict(frames.labels))


def backbone_of_trajectory(
    name: str,
    topology: Path,
    trajectories: Sequence[Path],
    frame_spacing_ps: float | None = None,
    representations: str | None = None,
) -> tuple[System, Frames]:
    """System and Frames of trajectories that MDTraj reads (PSF/PDB/... with DCD/XTC/...), whole across periodic walls.

    Times are the files' own, or multiples of frame_spacing_ps; representations are what representations.represented takes.
    Raises UserError naming the file.
    """
    if not trajectories:
        raise UserError(f"{topology}: no trajectory given; name at least one file")
    whole = _topology(topology)
    listed = [
        (Place(residue.chain.index, residue.resSeq), residue.name, {atom.name: atom.index for atom in residue.atoms})
        for residue in whole.residues
    ]
    places, names, sites, more = _chosen_sites(str(topology), listed)
    loaded = [_load(path, whole, sites.ravel()) for path in trajectories]
    atoms = np.concatenate([positions for positions, _ in loaded]).reshape(-1, len(places), 3, 3)
    times = np.concatenate([times for _, times in loaded])
    time_ps = times if frame_spacing_ps is None else frame_spacing_ps * np.arange(len(times))
    origin = {"source": [topology.name, *(path.name for path in trajectories)]}
    system, frames = _assembled(name, places, names, atoms, time_ps, origin | more)
    return _represented(system, representations), frames


def residue_chain(name: str, residue_names: Sequence[str], origin: Mapping[str, Any] | None = None) -> System:
    """System of one chain of these residues (three-letter names), each joined to the next; caps are left out.

    Raises UserError where no residue is left.
    """
    names = [residues.standard_name(one) for one in residue_names if one not in NO_RESIDUES]
    if not names:
        raise UserError(f"system {name!r}: no residue among {', '.join(residue_names) or 'none'}; expected amino acids")
    places = [Place(0, number) for number in range(1, len(names) + 1)]
    return _system(name, places, names, np.ones(len(names) - 1, dtype=bool), dict(origin or {}))


def full_backbone(system: System, positions: np.ndarray, rotations: np.ndarray) -> tuple[System, np.ndarray]:
    """Atoms N, CA, C, O, CB (no CB in glycine) of frames, positions [S, N, 3] Å and rotations [S, N, 3, 3], S > 0.

    Returns a MOLECULE System of M atoms, its first conformation for reference, and positions [S, M, 3] Å; ideal geometry.
    """
    n = system.n_sites
    if positions.shape != (len(positions), n, 3) or rotations.shape != (len(positions), n, 3, 3) or not len(positions):
        raise InvalidSystemError(
            f"system {system.name!r}: positions {positions.shape} and rotations {rotations.shape}, "
            f"expected (S, {n}, 3) and (S, {n}, 3, 3) with S > 0"
        )
    joined = np.zeros(n, dtype=bool)
    joined[[i for i, j in system.bonds.tolist() if j == i + 1]] = True
    turned, placed = (torch.from_numpy(np.asarray(values, float)) for values in (rotations, positions))
    atoms = backbone_from_frames(turned, placed, torch.from_numpy(joined)).numpy().reshape(len(positions), -1, 3)
    kept = [
        len(BACKBONE_ATOMS) * residue + k
        for residue, k in itertools.product(range(n), range(len(BACKBONE_ATOMS)))
        if BACKBONE_ATOMS[k] != "CB" or system.residue_names[residue] != "GLY"
    ]
    return _atomic_system(system, np.array(kept), joined, atoms[0, kept]), atoms[:, kept]


def _represented(system: System, source: str | None) -> System:
    return system if source is None else represented(system, source)


def _common(name: str, models: Sequence[BackboneModel]) -> tuple[tuple[Place, ...], list[str]]:
    """Places that all models have, in the first one's order, and a report of the others."""
    shared = set.intersection(*(set(model.places) for model in models))
    if not shared:
        counts = ", ".join(f"{model.source}: {len(model.places)}" for model in models[:_LISTED])
        raise UserError(
            f"system {name!r}: no residue number is common to its structures ({counts}); renumber them alike"
        )
    missing = []
    for place in sorted({place for model in models for place in model.places} - shared):
        holder = next(model for model in models if place in model.places)
        lacking = next(model.source for model in models if place not in model.places)
        missing.append(f"{lacking}: {_label(place, holder.names[holder.places.index(place)])} (not in this structure)")
    return tuple(place for place in models[0].places if place in shared), missing


def _agreed_names(
    name: str, models: Sequence[BackboneModel], kept: Sequence[Place], options: BackboneOptions
) -> tuple[tuple[str, ...], list[str]]:
    tables = [dict(zip(model.places, model.names, strict=True)) for model in models]
    differing = [
        f"{_label(place, tables[0][place])} is {table[place]} in {model.source}"
        for model, table in zip(models, tables, strict=True)
        for place in kept
        if table[place] != tables[0][place]
    ]
    if differing and options.differences is Differences.REFUSE:
        more = f" and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
        raise UserError(
            f"system {name!r}: structures differ from {models[0].source} in sequence: {'; '.join(differing[:_LISTED])}"
            f"{more}; give structures of one sequence numbered alike, or differences = {Differences.AS_FIRST}"
        )
    return tuple(tables[0][place] for place in kept), _unique(differing)


def _atoms_at(model: BackboneModel, places: Sequence[Place]) -> np.ndarray:
    row = {place: number for number, place in enumerate(model.places)}
    return model.atoms[[row[place] for place in places]]


def _label(place: Place, name: str) -> str:
    return f"chain {place.chain + 1} {name} {place.number}{place.insertion}"


def _unique(lines: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(lines))


_Listed = tuple[Place, str, dict[str, int]]
_Chosen = tuple[tuple[Place, ...], tuple[str, ...], np.ndarray, dict[str, Any]]


def _chosen_sites(source: str, listed: Sequence[_Listed]) -> _Chosen:
    """Places, names, sites [N, 3] of N, CA, C, and a report, of (place, residue name, site by atom name)."""
    left_out, replaced = [], []
    kept: list[tuple[Place, str, list[int]]] = []
    for place, name, atoms in listed:
        parent = None if name in NO_RESIDUES else parent_name(name)
        missing = [atom for atom in ATOMS if atom not in atoms]
        if parent is None and not missing and name not in NO_RESIDUES:
            raise UserError(f"{source}: {_label(place, name)} has a backbone, but no standard amino acid is its parent")
        if parent and missing:
            left_out.append(f"{_label(place, name)} (no {', '.join(missing)})")
        elif parent:
            kept.append((place, parent, [atoms[atom] for atom in ATOMS]))
            replaced += [] if parent == residues.standard_name(name) else [f"{_label(place, name)} -> {parent}"]
    if not kept:
        raise UserError(f"{source}: no amino-acid residue with N, CA and C in it; expected a protein in atomic detail")
    places, names, sites = zip(*kept, strict=True)
    return places, names, np.array(sites), {"left_out": left_out, "replaced": replaced}


def _topology(path: Path) -> Any:
    import mdtraj

    if not path.is_file():
        raise UserError(f"no topology file at {path}")
    try:
        return mdtraj.load_topology(str(path))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: MDTraj cannot read a topology from it: {error}") from error


def _load(path: Path, topology: Any, sites: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions [F, len(sites), 3] Å in the order of sites, and times [F] ps."""
    import mdtraj

    if not path.is_file():
        raise UserError(f"no file at {path}")
    with_topology = {} if path.suffix.lower() in (".pdb", ".h5", ".hdf5", ".gro") else {"top": topology}
    order = np.argsort(sites)
    try:
        loaded = mdtraj.load(str(path), atom_indices=sites[order], **with_topology)
    except (OSError, ValueError, IndexError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{path}: MDTraj cannot read it with this topology ({topology.n_atoms} atoms): {error}"
        ) from error
    positions = np.asarray(loaded.xyz, float)[:, np.argsort(order)]
    if loaded.unitcell_vectors is not None:
        positions = _whole(positions, np.asarray(loaded.unitcell_vectors, float))
    return positions * ANGSTROM_PER_NM, np.asarray(loaded.time, float)


def _whole(positions: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Positions [F, A, 3] with each atom in the image nearest to the one before it; cells [F, 3, 3]."""
    steps = np.diff(positions, axis=1)
    walls = np.round(steps @ np.linalg.inv(cells)) @ cells
    return np.concatenate([positions[:, :1], positions[:, 1:] - np.cumsum(walls, axis=1)], axis=1)


def _assembled(
    name: str,
    places: Sequence[Place],
    names: Sequence[str],
    atoms: np.ndarray,
    time_ps: np.ndarray,
    origin: dict[str, Any],
    labels: Mapping[str, np.ndarray] | None = None,
) -> tuple[System, Frames]:
    """System and Frames of residues whose N, CA, C are atoms [F, N, 3, 3] Å; those without a frame are left out."""
    if not len(atoms):
        raise InvalidSystemError(f"system {name!r}: no frames to take a backbone from; give at least one")
    bad = np.argwhere(~np.isfinite(atoms).all(axis=(2, 3)))
    if len(bad):
        frame, residue = bad[0].tolist()
        raise InvalidSystemError(
            f"system {name!r}, frame {frame}: {_label(places[residue], names[residue])} has positions that are not "
            f"finite; drop the frame"
        )
    tensor = torch.from_numpy(atoms)
    good = is_well_formed(*tensor.unbind(2)).all(dim=0).numpy()
    lost = [f"{_label(places[i], names[i])} (N, CA, C make no frame)" for i in np.flatnonzero(~good)]
    if not good.any():
        raise InvalidSystemError(f"system {name!r}: no residue has a frame; {lost[0]}")
    kept = np.flatnonzero(good)
    rotations, positions = frames_from_backbone(*tensor[:, kept].unbind(2))
    origin = origin | {"left_out": [*origin.get("left_out", []), *lost]}
    system = _system(name, [places[i] for i in kept], [names[i] for i in kept], _joined(places, atoms, kept), origin)
    return system, Frames(
        positions.numpy(), np.asarray(time_ps, float), rotations=rotations.numpy(), labels=dict(labels or {})
    )


def _joined(places: Sequence[Place], atoms: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Which neighbours [len(kept) - 1] a peptide bond joins in at least one frame."""
    before, after = kept[:-1], kept[1:]
    lengths = np.linalg.norm(atoms[:, after, 0] - atoms[:, before, 2], axis=-1)
    same_chain = np.array([places[i].chain == places[j].chain for i, j in zip(before, after, strict=True)], dtype=bool)
    return same_chain & (lengths < _LONGEST_PEPTIDE_BOND).any(axis=0)


def _system(
    name: str, places: Sequence[Place], names: Sequence[str], joined: np.ndarray, origin: dict[str, Any]
) -> System:
    n = len(places)
    number, chains = _residue_index(places, joined), np.array([place.chain for place in places])
    bonds = np.stack([np.flatnonzero(joined), np.flatnonzero(joined) + 1], axis=1)
    return System(
        name=name,
        kind=SystemKind.PROTEIN,
        elements=np.full(n, COARSE_GRAINED_BEAD),
        atom_names=("CA",) * n,
        residue_names=tuple(names),
        residue_index=number,
        chain_index=chains,
        bonds=bonds,
        bond_orders=np.zeros(len(bonds)),
        formal_charges=np.zeros(n),
        stereocentres=np.zeros((0, 4)),
        mobile=np.ones(n, dtype=bool),
        reference_positions=_extended(number, chains),
        origin=origin,
    )


def _residue_index(places: Sequence[Place], joined: np.ndarray) -> np.ndarray:
    """0-based and increasing over all chains; a gap in a chain's numbering stays one, unless a bond spans it."""
    index = [0]
    for before, after, bonded in zip(places[:-1], places[1:], joined.tolist(), strict=True):
        plain = bonded or before.chain != after.chain
        index.append(index[-1] + (1 if plain else max(1, after.number - before.number)))
    return np.array(index)


def _extended(number: np.ndarray, chains: np.ndarray) -> np.ndarray:
    """A planar zigzag of 3.8 Å steps per chain, chains side by side, centred."""
    first = np.array([number[chains == chain].min() for chain in chains])
    along = number - first
    side = np.sqrt(_CA_SPACING**2 - _EXTENDED_RISE**2) * (along % 2)
    placed = np.stack([_EXTENDED_RISE * along, side, _CHAIN_SPACING * chains], axis=1)
    return placed - placed.mean(axis=0)


def _atomic_system(system: System, kept: np.ndarray, joined: np.ndarray, positions: np.ndarray) -> System:
    """The System of atoms `kept` among all residues' BACKBONE_ATOMS."""
    width = len(BACKBONE_ATOMS)
    sites = kept // width
    names = tuple(BACKBONE_ATOMS[k] for k in kept % width)
    inside = [
        (width * r + BACKBONE_ATOMS.index(a), width * r + BACKBONE_ATOMS.index(b))
        for r in range(system.n_sites)
        for a, b in (("N", "CA"), ("CA", "C"), ("C", "O"), ("CA", "CB"))
    ]
    between = [(width * r + 2, width * (r + 1)) for r in np.flatnonzero(joined)]
    place = {old: new for new, old in enumerate(kept.tolist())}
    bonds = sorted((place[i], place[j]) for i, j in inside + between if i in place and j in place)
    named = residues.NamedAtoms(
        elements=np.array([_ELEMENTS[name] for name in names]),
        atom_names=names,
        residue_names=tuple(system.residue_names[site] for site in sites),
        residue_index=system.residue_index[sites],
        bonds=np.array(bonds, dtype=np.int64).reshape(-1, 2),
    )
    return System(
        name=system.name,
        kind=SystemKind.MOLECULE,
        elements=named.elements,
        atom_names=names,
        residue_names=named.residue_names,
        residue_index=named.residue_index,
        chain_index=system.chain_index[sites],
        bonds=named.bonds,
        bond_orders=residues.bond_orders(named),
        formal_charges=np.zeros(len(names)),
        stereocentres=residues.stereocentres(named, positions),
        mobile=system.mobile[sites],
        reference_positions=positions,
        origin={"source": "frames", "of": system.system_id},
    )
