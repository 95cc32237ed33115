"""PDB or mmCIF files -> the heavy atoms of a protein that a ligand binds to, as a System whose sites all are POCKET.

In: a structure file. Out: its polymers as they stand in the file - chain breaks, missing side chains and modified residues
are kept - and metal ions. Every other small molecule is dropped and counted, unless it is named as a cofactor to keep: a
file does not say which one is a copy of the ligand. First model, first alternative location. Bonds within a residue come
from distances and covalent radii (as Open Babel perceives them); between residues they are peptide bonds below 2 Å and
disulphides below 2.5 Å. Formal charges are known where the file holds hydrogens. Knows no force field: nothing is
completed, nothing is moved.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import cKDTree

from dig_scale.errors import UserError
from dig_scale.importers import residues
from dig_scale.importers.backbone_file import check_coordinates
from dig_scale.system import SiteRole, System, SystemKind

if TYPE_CHECKING:
    import gemmi

_LONGEST_PEPTIDE_BOND = 2.0
_LONGEST_DISULPHIDE = 2.5
_BOND_TOLERANCE = 0.4
_PDB = (".pdb", ".ent")


@dataclass(frozen=True)
class LigandResidue:
    """A ligand inside a structure file: its residue name, and chain and number where several copies have that name."""

    name: str
    chain: str | None = None
    number: int | None = None

    def __str__(self) -> str:
        return self.name + (f" {self.chain or ''}{'' if self.number is None else self.number}".rstrip())


@dataclass(frozen=True)
class Receptor:
    """`system`: heavy atoms in the file's frame, residue_index in file order with gaps kept; residue_labels: as in 'A:LEU83'.

    dropped: how many residues of each name were left out.
    """

    system: System
    residue_labels: dict[int, str]
    dropped: dict[str, int]


def read_structure(path: Path) -> gemmi.Structure:
    """The first model of a PDB or mmCIF file in its first alternative locations; raises UserError naming the file."""
    import gemmi

    if not path.is_file():
        raise UserError(f"no structure file at {path}")
    if path.suffix.lower() in _PDB:  # gemmi reads what is no number as 0
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if line.startswith(("ATOM  ", "HETATM")):
                check_coordinates(path, number, line)
    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a PDB or mmCIF file: {error}") from error
    if not len(structure) or not structure[0].count_atom_sites():
        raise UserError(f"{path}: holds no atoms; expected a PDB or mmCIF file")
    for place in structure[0].all():
        if not np.isfinite(place.atom.pos.tolist()).all():
            raise UserError(f"{path}: the coordinates of {place} are not finite; the file is damaged")
    while len(structure) > 1:
        del structure[-1]
    structure.remove_alternative_conformations()
    return structure


def find_ligand(structure: gemmi.Structure, ligand: LigandResidue, path: Path) -> gemmi.Residue:
    """The one residue that `ligand` names; raises UserError listing what the file holds otherwise."""
    matches = [
        (chain.name, residue)
        for chain in structure[0]
        for residue in chain
        if residue.name == ligand.name
        and ligand.chain in (None, chain.name)
        and ligand.number in (None, residue.seqid.num)
    ]
    if len(matches) == 1:
        return matches[0][1]
    if matches:
        listed = ", ".join(f"{name}{residue.seqid}" for name, residue in matches)
        raise UserError(f"{path}: {len(matches)} residues are {ligand}: {listed}; name chain and number of one")
    others = sorted({r.name for c in structure[0] for r in c if not residues.is_peptide([r.name]) and not r.is_water()})
    raise UserError(f"{path}: no residue {ligand}; other than amino acids it holds {', '.join(others) or 'nothing'}")


def receptor_of(name: str, structure: gemmi.Structure, path: Path, cofactors: Sequence[str] = ()) -> Receptor:
    """Receptor of a structure with cofactors of these residue names; raises UserError where a name or a protein is missing."""
    kept, dropped = _kept_residues(structure, cofactors)
    absent = sorted(set(cofactors) - {residue.content.name for residue in kept})
    if absent:
        raise UserError(f"{path}: no cofactor {absent[0]!r}; small molecules in it: {', '.join(dropped) or 'none'}")
    if not kept:
        raise UserError(f"{path}: no protein in it; found {', '.join(dropped)}")
    table = _atom_table(kept)
    named = residues.NamedAtoms(
        table.elements, table.atom_names, table.residue_names, table.residue_index, _bonds(kept, table)
    )
    orders = residues.bond_orders(named)
    whole = System(
        name=name,
        kind=SystemKind.MOLECULE,
        elements=table.elements,
        atom_names=table.atom_names,
        residue_names=table.residue_names,
        residue_index=table.residue_index,
        chain_index=table.chain_index,
        bonds=named.bonds,
        bond_orders=orders,
        formal_charges=_charges(named, orders),
        stereocentres=residues.stereocentres(named, table.positions),
        mobile=np.zeros(len(table.elements), bool),
        reference_positions=table.positions,
        roles=np.full(len(table.elements), SiteRole.POCKET),
        origin={"source": path.name},
    )
    labels = {residue.index: residue.label for residue in kept}
    return Receptor(whole.select(whole.heavy_sites()), labels, dropped)


@dataclass(frozen=True)
class _Residue:
    """A residue that is kept: its running number, chain number, label, and atoms."""

    index: int
    chain: int
    label: str
    content: gemmi.Residue


@dataclass(frozen=True)
class _AtomTable:
    elements: np.ndarray
    atom_names: tuple[str, ...]
    residue_names: tuple[str, ...]
    residue_index: np.ndarray
    chain_index: np.ndarray
    positions: np.ndarray


def _kept_residues(structure: gemmi.Structure, cofactors: Sequence[str]) -> tuple[list[_Residue], dict[str, int]]:
    kept: list[_Residue] = []
    dropped: Counter[str] = Counter()
    index = -1
    for number, chain in enumerate(structure[0]):
        previous: int | None = None
        for residue in chain:
            position = residue.seqid.num
            index += max(1, position - previous) if previous is not None and position is not None else 1
            previous = position
            if residue.name in cofactors or _is_polymer(residue) or _is_metal(residue):
                kept.append(_Residue(index, number, f"{chain.name}:{residue.name}{residue.seqid}", residue))
            else:
                dropped[residue.name] += 1
    return kept, dict(sorted(dropped.items()))


def _is_polymer(residue: gemmi.Residue) -> bool:
    import gemmi

    known = gemmi.find_tabulated_residue(residue.name)
    modified = {"N", "CA", "C"} <= {atom.name for atom in residue}
    return residues.is_peptide([residue.name]) or known.is_amino_acid() or known.is_nucleic_acid() or modified


def _is_metal(residue: gemmi.Residue) -> bool:
    return len(residue) == 1 and bool(residue[0].element.is_metal)


def _atom_table(kept: list[_Residue]) -> _AtomTable:
    rows = [(residue, atom) for residue in kept for atom in residue.content]
    return _AtomTable(
        elements=np.array([atom.element.atomic_number for _, atom in rows], np.int64),
        atom_names=tuple(atom.name for _, atom in rows),
        residue_names=tuple(residue.content.name for residue, _ in rows),
        residue_index=np.array([residue.index for residue, _ in rows], np.int64),
        chain_index=np.array([residue.chain for residue, _ in rows], np.int64),
        positions=np.array([atom.pos.tolist() for _, atom in rows]),
    )


def _bonds(kept: list[_Residue], table: _AtomTable) -> np.ndarray:
    starts = np.flatnonzero(np.r_[True, np.diff(table.residue_index) > 0, True])
    found: set[tuple[int, int]] = set()
    for start, stop in itertools.pairwise(starts.tolist()):
        members = np.arange(start, stop)
        found |= _contacts(members, table)
    found |= _links(
        table, ("C", "N"), _LONGEST_PEPTIDE_BOND, lambda i, j: bool(table.residue_index[i] < table.residue_index[j])
    )
    found |= _links(table, ("SG", "SG"), _LONGEST_DISULPHIDE, lambda i, j: i < j)
    return np.array(sorted(found), dtype=np.int64).reshape(-1, 2)


def _contacts(members: np.ndarray, table: _AtomTable) -> set[tuple[int, int]]:
    """Bonds within a residue: heavy atoms closer than their covalent radii allow, each hydrogen to its nearest heavy atom."""
    positions, elements = table.positions[members], table.elements[members]
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    radii = _covalent_radii(elements)
    heavy = elements != 1
    bonded = (distances < radii[:, None] + radii[None] + _BOND_TOLERANCE) & heavy[:, None] & heavy[None]
    pairs = [(int(i), int(j)) for i, j in np.argwhere(np.triu(bonded, 1))]
    if heavy.any():
        nearest = np.where(heavy[None], distances, np.inf).argmin(axis=1)
        pairs += [(int(h), int(nearest[h])) for h in np.flatnonzero(~heavy)]
    return {(int(members[min(i, j)]), int(members[max(i, j)])) for i, j in pairs}


def _covalent_radii(elements: np.ndarray) -> np.ndarray:
    import gemmi

    radius = {int(z): float(gemmi.Element(int(z)).covalent_r) for z in np.unique(elements)}
    return np.array([radius[int(z)] for z in elements])


def _links(
    table: _AtomTable, names: tuple[str, str], longest: float, is_in_order: Callable[[int, int], bool]
) -> set[tuple[int, int]]:
    """Bonds between atoms of these names in different residues, closer than `longest`."""
    first, second = (np.array([i for i, n in enumerate(table.atom_names) if n == name], np.int64) for name in names)
    if not len(first) or not len(second):
        return set()
    near = cKDTree(table.positions[first]).query_ball_tree(cKDTree(table.positions[second]), longest)
    pairs = [(int(first[a]), int(second[b])) for a, others in enumerate(near) for b in others]
    return {
        (min(i, j), max(i, j))
        for i, j in pairs
        if table.residue_index[i] != table.residue_index[j] and is_in_order(i, j)
    }


def _charges(named: residues.NamedAtoms, orders: np.ndarray) -> np.ndarray:
    """Formal charges of residues that hold hydrogens; a nitrogen at a chain break lacks a neighbour, not a proton."""
    charges = residues.formal_charges(named, orders)
    with_hydrogens = np.unique(named.residue_index[named.elements == 1])
    known = np.isin(named.residue_index, with_hydrogens) & ~((named.elements == 7) & (charges < 0))
    return np.where(known, charges, 0)
