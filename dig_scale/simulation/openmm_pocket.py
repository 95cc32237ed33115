"""A ligand and the part of a protein around it with all atoms: one molecule for MMFF.

In: a structure file, and a ligand with all atoms where it sits in that structure. Out: a System whose first sites are the
ligand's (LIGAND, mobile) and whose other sites are the pocket's (POCKET): residues near the ligand as they stand in the
file, cut chains capped by the neighbours' own atoms (ACE and NME), missing side chains completed, hydrogens added at pH 7.
The pocket's heavy atoms are not mobile, so that dynamics keeps them in place; its hydrogens are. Water, ions and
residues that are no amino acid are left out, and said in the origin.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from openmm import app

from dig_scale.importers import residues
from dig_scale.importers.atoms import bonds_of, system_of_atoms
from dig_scale.importers.completion import complete_heavy_atoms
from dig_scale.importers.molecule import molecule_names, read_molecules, systems_from_file
from dig_scale.importers.pocket import Place, Points
from dig_scale.importers.protein import repeatable_random
from dig_scale.simulation.engine import SimulationError
from dig_scale.system import SiteRole, System, SystemKind
from dig_scale.units import ANGSTROM_PER_NM

if TYPE_CHECKING:
    from openmm.app.topology import Residue
    from pdbfixer import PDBFixer

_PH = 7.0
_LONGEST_PEPTIDE_BOND = 2.0
_ACE_ATOMS = {"CA": "CH3", "C": "C", "O": "O"}
_NME_ATOMS = {"N": "N", "CA": "C"}


@dataclass(frozen=True)
class _Structure:
    """A PDB file: residues in order, heavy-atom positions by residue and atom name, and whether each continues the last."""

    residues: tuple[Residue, ...]
    places: tuple[dict[str, np.ndarray], ...]
    continues: tuple[bool, ...]


def posed_ligands(path: Path) -> dict[str, System]:
    """Systems with all atoms of the molecules of an SDF or MOL2 file, by name, in the file's frame instead of centred."""
    molecules, systems = read_molecules(path), systems_from_file(path)
    posed = {}
    for name, molecule, system in zip(molecule_names(molecules), molecules, systems, strict=True):
        if not molecule.GetNumConformers():
            raise SimulationError(f"{path}: {name} has no coordinates, so its place in the pocket is not known")
        there = np.array(molecule.GetConformer().GetPositions())
        shift = (there - system.reference_positions[: len(there)]).mean(axis=0)
        posed[name] = replace(system, reference_positions=system.reference_positions + shift)
    return posed


def pocket_complex(name: str, protein: Path, ligand: System, radius: float, place: Place | None = None) -> System:
    """`ligand` with all residues of `protein` that have a heavy atom within `radius` Å of a place, or of its own heavy atoms.

    Raises SimulationError when there is none, UserError for a structure that cannot be read or completed.
    """
    structure = _read(protein)
    around = place or Points(ligand.reference_positions[ligand.heavy_sites()])
    chosen, skipped = _near(structure, around, radius)
    if not chosen:
        raise SimulationError(f"system {name!r}: no amino acid of {protein} within {radius:g} Å of the ligand")
    pocket = _pocket(name, _cut_out(structure, chosen), protein)
    labels = [_label(structure.residues[i]) for i in chosen]
    origin = {"source": protein.name, "ligand": ligand.name, "pocket_cutoff": radius, "pocket_residues": labels}
    return _joined(ligand, pocket, name, origin | ({"dropped": skipped} if skipped else {}))


def _read(path: Path) -> _Structure:
    if not path.is_file():
        raise SimulationError(f"no structure file at {path}")
    try:
        content = app.PDBxFile(str(path)) if path.suffix.lower() in (".cif", ".mmcif") else app.PDBFile(str(path))
    except (ValueError, KeyError, IndexError, AssertionError, UnicodeDecodeError) as error:
        raise SimulationError(f"{path}: cannot be read as a PDB or mmCIF file: {error}") from error
    positions = content.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
    found = tuple(content.topology.residues())
    places = tuple({a.name: positions[a.index] for a in residue.atoms() if _is_heavy(a)} for residue in found)
    joined = [
        one.chain is two.chain and _is_bonded(p, q) for (one, p), (two, q) in pairwise(zip(found, places, strict=True))
    ]
    return _Structure(found, places, (False, *joined))


def _is_heavy(atom: Any) -> bool:
    return atom.element is not None and atom.element.atomic_number > 1


def _is_bonded(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    return "C" in one and "N" in two and bool(np.linalg.norm(one["C"] - two["N"]) < _LONGEST_PEPTIDE_BOND)


def _near(structure: _Structure, around: Place, radius: float) -> tuple[list[int], dict[str, int]]:
    """Numbers of the residues that are in, and how many others that near were left out, by name.

    A single residue between two that are in is in as well: it could not cap both.
    """
    chosen: set[int] = set()
    skipped: dict[str, int] = {}
    for number, (residue, places) in enumerate(zip(structure.residues, structure.places, strict=True)):
        here = np.array(list(places.values())).reshape(-1, 3)
        if not len(here) or around.distances(here).min() > radius:
            continue
        if residues.standard_name(residue.name) in residues.AMINO_ACIDS:
            chosen.add(number)
        elif not residues.is_peptide([residue.name]):
            skipped[residue.name] = skipped.get(residue.name, 0) + 1
    between = {i + 1 for i in chosen if i + 2 in chosen and structure.continues[i + 1] and structure.continues[i + 2]}
    ordinary = {i for i in between if residues.standard_name(structure.residues[i].name) in residues.AMINO_ACIDS}
    return sorted(chosen | ordinary), skipped


def _cut_out(structure: _Structure, chosen: list[int]) -> str:
    """PDB text of the chosen residues with their caps, one chain per uncut piece."""
    lines: list[str] = []
    last = len(structure.residues) - 1
    for position, number in enumerate(chosen):
        starts_piece = position == 0 or chosen[position - 1] != number - 1 or not structure.continues[number]
        ends_piece = (
            position + 1 == len(chosen) or chosen[position + 1] != number + 1 or not structure.continues[number + 1]
        )
        if starts_piece and structure.continues[number]:
            lines += _rows("ACE", number - 1, _renamed(structure.places[number - 1], _ACE_ATOMS))
        name = residues.standard_name(structure.residues[number].name)
        lines += _rows(name, number, structure.places[number])
        if ends_piece and number < last and structure.continues[number + 1]:
            lines += _rows("NME", number + 1, _renamed(structure.places[number + 1], _NME_ATOMS))
        lines += ["TER"] if ends_piece else []
    return "\n".join([*lines, "END", ""])


def _renamed(places: dict[str, np.ndarray], names: dict[str, str]) -> dict[str, np.ndarray]:
    return {new: places[old] for old, new in names.items() if old in places}


def _rows(residue: str, number: int, places: dict[str, np.ndarray]) -> list[str]:
    """PDB rows; elements of amino acids are the first letters of their atoms' names."""
    return [
        f"ATOM  {0:5d}  {atom:<3s} {residue:>3s} A{(number + 1) % 10_000:4d}    {x:8.3f}{y:8.3f}{z:8.3f}"
        f"  1.00  0.00          {atom[0]:>2s}"
        for atom, (x, y, z) in places.items()
    ]


def _pocket(name: str, text: str, protein: Path) -> System:
    topology, placed = complete_heavy_atoms(_fixer(text), protein.name)
    modeller = app.Modeller(topology, placed / ANGSTROM_PER_NM)
    with repeatable_random():
        modeller.addHydrogens(pH=_PH, platform=_reference_platform())
    atoms = list(modeller.topology.atoms())
    positions = np.array(modeller.positions._value) * ANGSTROM_PER_NM
    bonds = bonds_of((bond[0], bond[1]) for bond in modeller.topology.bonds())
    system = system_of_atoms(name, atoms, bonds, np.round(positions, 4), {})
    return replace(system, mobile=system.elements == 1, roles=np.full(len(atoms), SiteRole.POCKET))


def _joined(ligand: System, pocket: System, name: str, origin: dict[str, Any]) -> System:
    first = ligand.n_sites

    def both(field: str, offset: int = 0) -> np.ndarray:
        return np.concatenate([getattr(ligand, field), getattr(pocket, field) + offset])

    return System(
        name=name,
        kind=SystemKind.MOLECULE,
        elements=both("elements"),
        atom_names=ligand.atom_names + pocket.atom_names,
        residue_names=ligand.residue_names + pocket.residue_names,
        residue_index=both("residue_index", int(ligand.residue_index.max()) + 1),
        chain_index=both("chain_index", int(ligand.chain_index.max()) + 1),
        bonds=both("bonds", first),
        bond_orders=both("bond_orders"),
        formal_charges=both("formal_charges"),
        stereocentres=both("stereocentres", first),
        mobile=np.concatenate([np.ones(first, bool), pocket.mobile]),
        reference_positions=both("reference_positions"),
        roles=np.concatenate([np.full(first, SiteRole.LIGAND), pocket.roles]),
        origin=origin,
    )


def _label(residue: Residue) -> str:
    return f"{residue.chain.id}:{residue.name}{residue.id}"


def _fixer(text: str) -> PDBFixer:
    from pdbfixer import PDBFixer

    return PDBFixer(pdbfile=io.StringIO(text))


def _reference_platform() -> Any:
    """The platform whose results are the same on every machine."""
    from openmm import Platform

    return Platform.getPlatformByName("Reference")
