"""Ligands in protein pockets -> System and Frames: a ligand file and a structure file, or one structure that holds both.

In: SDF, MOL, MOL2 or SMILES, and PDB or mmCIF. Out: a System of kind MOLECULE, heavy atoms alone: the ligand first (LIGAND,
mobile), then the pocket (POCKET, in the crystal's frame). The reference geometry of the ligand is a computed conformer with
its centroid on that of the pocket's atoms; where the ligand really lies stands in the Frames alone. The pocket is cut out
around a place that all ligands of a file share, so that it does not tell where one of them lies. Knows no force field.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dig_scale.errors import UserError
from dig_scale.importers import receptor as receptors
from dig_scale.importers.molecule import (
    Ligand,
    ligand_from_molecule,
    ligand_from_smiles,
    molecule_from_atoms,
    molecule_names,
    read_molecules,
)
from dig_scale.importers.receptor import LigandResidue, Receptor
from dig_scale.system import Frames, SiteRole, System, SystemKind

CONTACT_DISTANCE = 5.0
"""Å; a ligand without a pocket atom this near is not in the pocket."""
OVERLAP_DISTANCE = 1.0
"""Å; a pocket atom this near to the ligand's is a copy of the ligand, or of a covalent neighbour."""


class PocketMotion(enum.StrEnum):
    """Whether the pocket's atoms diffuse with the ligand."""

    FIXED = "fixed"
    MOBILE = "mobile"


@dataclass(frozen=True)
class Box:
    """A place: a box between two corners [3] in Å, in the protein's frame."""

    low: np.ndarray
    high: np.ndarray
    named: str = "the pocket's box"
    """What it is, for messages."""

    def __post_init__(self) -> None:
        if np.shape(self.low) != (3,) or np.shape(self.high) != (3,) or np.any(np.greater(self.low, self.high)):
            raise UserError(
                f"box from {self.low} to {self.high}: expected two corners (x, y, z) in Å, the lower one first"
            )

    def distances(self, positions: np.ndarray) -> np.ndarray:
        """Distance [N] in Å of positions [N, 3] from the box; 0 inside."""
        return np.asarray(np.linalg.norm(positions - np.clip(positions, self.low, self.high), axis=-1))


@dataclass(frozen=True)
class Points:
    """A place: points [K, 3] in Å in the protein's frame, as the atoms of a reference ligand, or one centre."""

    positions: np.ndarray
    named: str = "the pocket's place"
    """What they are, for messages."""

    def __post_init__(self) -> None:
        if np.ndim(self.positions) != 2 or np.shape(self.positions)[1:] != (3,) or not len(self.positions):
            raise UserError(f"points of shape {np.shape(self.positions)}: expected (K, 3) in Å with at least one point")

    def distances(self, positions: np.ndarray) -> np.ndarray:
        """Distance [N] in Å of positions [N, 3] from the nearest point."""
        from scipy.spatial import cKDTree

        return np.asarray(cKDTree(self.positions).query(positions)[0])


Place = Box | Points


@dataclass(frozen=True)
class PocketOptions:
    """How a pocket is cut out.

    cutoff: Å; residues with a heavy atom this near to the place are in. shell: Å; of them, only atoms this near (None: whole
    residues). motion: whether pocket atoms diffuse. place: where the pocket is; None: the poses of the file's ligands, or
    of those named in `defined_by`, so that a held-out ligand need not take part. cofactors: residue names of small molecules
    that belong to the pocket; all others are dropped. name: of the systems (None: the protein's).
    """

    cutoff: float = 10.0
    shell: float | None = None
    motion: PocketMotion = PocketMotion.FIXED
    place: Place | None = None
    defined_by: tuple[str, ...] = ()
    cofactors: tuple[str, ...] = ()
    name: str | None = None

    def __post_init__(self) -> None:
        if self.cutoff <= 0 or (self.shell is not None and not 0 < self.shell <= self.cutoff):
            raise UserError(f"pocket cutoff {self.cutoff} Å, shell {self.shell} Å: expected 0 < shell <= cutoff")


@dataclass(frozen=True)
class Pocket:
    """Sites of a protein around a place: `system` (its positions the crystal's), and what is known of them as JSON."""

    system: System
    source: str
    description: dict[str, Any]


def centre(x: float, y: float, z: float) -> Points:
    """The place of one point in Å; residues are taken within the cutoff of it."""
    return Points(np.array([[x, y, z]], np.float64))


def place_of_ligands(path: Path, names: Sequence[str] = ()) -> Points:
    """The place where the posed ligands of an SDF or MOL2 file lie, all of them or those of these names."""
    molecules = read_molecules(path)
    return _place_of(molecules, molecule_names(molecules), names, path)


def pocket_of(protein: Path, place: Place, options: PocketOptions) -> Pocket:
    """The pocket of a PDB or mmCIF file around a place; raises UserError naming the file when there is none."""
    structure = receptors.read_structure(protein)
    receptor = receptors.receptor_of(options.name or protein.stem, structure, protein, options.cofactors)
    return _cut_out(receptor, place, options, protein)


def pocket_systems(protein: Path, ligands: Path, options: PocketOptions | None = None) -> list[tuple[System, Frames]]:
    """System and pose of every ligand of a file, in its order, all with one pocket; raises UserError naming the ligand.

    Frames: one frame, ligand as posed, pocket as in the crystal, Å.
    """
    chosen = options or PocketOptions()
    molecules = read_molecules(ligands)
    names = molecule_names(molecules)
    place = chosen.place or _place_of(molecules, names, chosen.defined_by, ligands)
    pocket = pocket_of(protein, place, chosen)
    return [
        posed_in_pocket(ligand_from_molecule(name, molecule, {"ligand": name, "ligand_source": ligands.name}), pocket)
        for name, molecule in zip(names, molecules, strict=True)
    ]


def pocket_system(
    protein: Path, ligands: Path, ligand: str, options: PocketOptions | None = None
) -> tuple[System, Frames]:
    """System and pose of the one ligand of this name in a file, with the pocket that all its ligands share."""
    chosen = options or PocketOptions()
    molecules = read_molecules(ligands)
    names = molecule_names(molecules)
    place = chosen.place or _place_of(molecules, names, chosen.defined_by, ligands)
    molecule = molecules[_number(ligand, names, ligands)]
    posed = ligand_from_molecule(ligand, molecule, {"ligand": ligand, "ligand_source": ligands.name})
    return posed_in_pocket(posed, pocket_of(protein, place, chosen))


def pocket_system_from_smiles(name: str, protein: Path, smiles: str, options: PocketOptions) -> System:
    """System of a SMILES in the pocket at options.place; there is no pose. Raises UserError naming the text."""
    if options.place is None:
        raise UserError(
            f"system {name!r}: a SMILES has no pose; give the pocket's place: a box, a centre or a ligand's pose"
        )
    return in_pocket(ligand_from_smiles(name, smiles), pocket_of(protein, options.place, options))


def pocket_system_from_complex(
    structure: Path, ligand: LigandResidue, smiles: str | None = None, options: PocketOptions | None = None
) -> tuple[System, Frames]:
    """System and pose of a ligand that lies inside a PDB or mmCIF file; bond orders come from its SMILES.

    Without a SMILES the file must hold the ligand's hydrogens. Raises UserError naming the residue.
    """
    chosen = options or PocketOptions()
    read = receptors.read_structure(structure)
    residue = receptors.find_ligand(read, ligand, structure)
    elements = np.array([atom.element.atomic_number for atom in residue])
    positions = np.array([atom.pos.tolist() for atom in residue])
    molecule = molecule_from_atoms(elements, positions, smiles, f"{structure}, {ligand}")
    posed = ligand_from_molecule(ligand.name, molecule, {"ligand": str(ligand), "ligand_source": structure.name})
    heavy_names = tuple(atom.name for atom in residue if not atom.is_hydrogen())
    named = replace(posed.system, atom_names=heavy_names, residue_names=(ligand.name,) * posed.system.n_sites)
    receptor = receptors.receptor_of(chosen.name or structure.stem, read, structure, chosen.cofactors)
    place = chosen.place or Points(_pose(posed), named=f"ligand {ligand.name}")
    return posed_in_pocket(replace(posed, system=named), _cut_out(receptor, place, chosen, structure))


def in_pocket(ligand: Ligand, pocket: Pocket) -> System:
    """System of a ligand and a pocket: the ligand's conformer with its centroid on that of the pocket's atoms."""
    own, around = ligand.system, pocket.system
    n = own.n_sites
    lifted = own.reference_positions - own.reference_positions.mean(axis=0) + around.reference_positions.mean(axis=0)
    return System(
        name=f"{around.name}-{own.name}",
        kind=SystemKind.MOLECULE,
        elements=np.concatenate([own.elements, around.elements]),
        atom_names=own.atom_names + around.atom_names,
        residue_names=own.residue_names + around.residue_names,
        residue_index=np.concatenate([np.zeros(n, np.int64), around.residue_index + 1]),
        chain_index=np.concatenate([np.zeros(n, np.int64), around.chain_index + 1]),
        bonds=np.concatenate([own.bonds, around.bonds + n]),
        bond_orders=np.concatenate([own.bond_orders, around.bond_orders]),
        formal_charges=np.concatenate([own.formal_charges, around.formal_charges]),
        stereocentres=np.concatenate([own.stereocentres, around.stereocentres + n]),
        mobile=np.concatenate([np.ones(n, bool), around.mobile]),
        reference_positions=np.concatenate([np.round(lifted, 4), around.reference_positions]),
        roles=np.concatenate([np.full(n, SiteRole.LIGAND), around.roles]),
        origin={"source": pocket.source} | own.origin | pocket.description,
    )


def posed_in_pocket(ligand: Ligand, pocket: Pocket) -> tuple[System, Frames]:
    """System of a posed ligand in a pocket, and its pose; raises UserError where the ligand lies outside the pocket."""
    pose, around = _pose(ligand), pocket.system.reference_positions
    distances = Points(pose).distances(around)
    nearest = float(distances.min())
    if nearest < OVERLAP_DISTANCE:
        label = pocket.system.site_label(int(distances.argmin()))
        raise UserError(
            f"ligand {ligand.system.name!r} overlaps {label} of {pocket.source} ({nearest:.2f} Å): the structure still holds a"
            " copy of a ligand; remove it from the file"
        )
    if nearest > CONTACT_DISTANCE:
        raise UserError(
            f"ligand {ligand.system.name!r} lies outside the pocket of {pocket.source}: its nearest pocket atom is"
            f" {nearest:.1f} Å away, expected at most {CONTACT_DISTANCE:g} Å; check that both files share one frame"
        )
    return in_pocket(ligand, pocket), Frames(np.concatenate([pose, around])[None], np.zeros(1))


def _cut_out(receptor: Receptor, place: Place, options: PocketOptions, path: Path) -> Pocket:
    system = receptor.system
    distances = place.distances(system.reference_positions)
    near = np.isin(system.residue_index, np.unique(system.residue_index[distances <= options.cutoff]))
    kept = near if options.shell is None else near & (distances <= options.shell)
    if not kept.any():
        raise UserError(
            f"{path}: the protein has no atom within {options.shell or options.cutoff:g} Å of {place.named}; the nearest is"
            f" {distances.min():.1f} Å away: check that both are in one frame"
        )
    cut = system.select(np.flatnonzero(kept))
    mobile = np.full(cut.n_sites, options.motion is PocketMotion.MOBILE)
    labels = {str(index + 1): receptor.residue_labels[int(index)] for index in np.unique(cut.residue_index)}
    description: dict[str, Any] = {
        "pocket_cutoff": options.cutoff,
        "pocket_shell": options.shell,
        "pocket_residues": labels,
    }
    description |= {"dropped": receptor.dropped} if receptor.dropped else {}
    return Pocket(replace(cut, mobile=mobile), path.name, description)


def _place_of(molecules: Sequence[Any], names: Sequence[str], chosen: Sequence[str], path: Path) -> Points:
    numbers = [_number(name, names, path) for name in chosen] or range(len(molecules))
    posed = [molecules[number] for number in numbers if molecules[number].GetNumConformers()]
    heavy = [
        np.array(molecule.GetConformer().GetPositions())[[atom.GetAtomicNum() != 1 for atom in molecule.GetAtoms()]]
        for molecule in posed
    ]
    if not heavy:
        raise UserError(
            f"{path}: no molecule with coordinates, so the pocket's place is not known; give a box or a centre"
        )
    return Points(np.concatenate(heavy), named=f"the ligands of {path.name}")


def _number(name: str, names: Sequence[str], path: Path) -> int:
    if name not in names:
        listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise UserError(f"{path}: no ligand {name!r}; it holds {listed}")
    return names.index(name)


def _pose(ligand: Ligand) -> np.ndarray:
    if ligand.pose is None:
        raise UserError(f"ligand {ligand.system.name!r} has no pose; give an SDF file with coordinates")
    return ligand.pose
