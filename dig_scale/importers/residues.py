"""Chemistry of amino-acid residues, read off atom names: bond orders, formal charges and stereocentres.

In: names, bonds and positions (Å) of atoms with PDB names. Out: the arrays of a System. An atom of a residue that is not
in the tables gets bond order 0 (unknown) and charge 0. Knows no file format and no force field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dig_scale.errors import InvalidSystemError

THREE_LETTER = {
    "A": "ALA", "R": "ARG", "N": "ASN", "D": "ASP", "C": "CYS", "Q": "GLN", "E": "GLU", "G": "GLY", "H": "HIS", "I": "ILE",
    "L": "LEU", "K": "LYS", "M": "MET", "F": "PHE", "P": "PRO", "S": "SER", "T": "THR", "W": "TRP", "Y": "TYR", "V": "VAL",
}  # fmt: skip
AMINO_ACIDS = frozenset(THREE_LETTER.values())
CAPS = frozenset({"ACE", "NME"})
WATER = frozenset({"HOH", "WAT", "H2O", "SOL", "TIP3", "TIP", "DOD"})
IONS = frozenset(
    {"NA", "CL", "K", "LI", "RB", "CS", "MG", "CA", "ZN", "BR", "IOD", "SOD", "CLA", "POT", "NA+", "CL-", "MN"}
)

_SINGLE, _DOUBLE, _AROMATIC = 1, 2, 4
_DOUBLE_BONDS = {
    "ASP": ("CG", "OD1"),
    "GLU": ("CD", "OE1"),
    "ASN": ("CG", "OD1"),
    "GLN": ("CD", "OE1"),
    "ARG": ("CZ", "NH2"),
}
_RINGS = {
    "PHE": frozenset({"CG", "CD1", "CD2", "CE1", "CE2", "CZ"}),
    "TYR": frozenset({"CG", "CD1", "CD2", "CE1", "CE2", "CZ"}),
    "TRP": frozenset({"CG", "CD1", "NE1", "CE2", "CD2", "CE3", "CZ3", "CH2", "CZ2"}),
    "HIS": frozenset({"CG", "ND1", "CE1", "NE2", "CD2"}),
}
_VALENCE = {7: 3, 8: 2, 16: 2}
_ALPHA = ("CA", ("N", "C", "CB"))
_SIDE_CHAIN_CENTRES = {"THR": (("CB", ("CA", "OG1", "CG2")),), "ILE": (("CB", ("CA", "CG1", "CG2")),)}
_VARIANTS = {
    "HID": "HIS", "HIE": "HIS", "HIP": "HIS", "HSD": "HIS", "HSE": "HIS", "HSP": "HIS", "CYX": "CYS", "CYM": "CYS",
    "ASH": "ASP", "GLH": "GLU", "LYN": "LYS",
}  # fmt: skip


@dataclass(frozen=True)
class NamedAtoms:
    """Atoms as a PDB file names them: elements [N], names, residue_names, residue_index [N], bonds [E, 2] with i < j."""

    elements: np.ndarray
    atom_names: tuple[str, ...]
    residue_names: tuple[str, ...]
    residue_index: np.ndarray
    bonds: np.ndarray


def standard_name(residue_name: str) -> str:
    """The amino acid's common name of a protonation variant (HIE -> HIS); other names as they are."""
    return _VARIANTS.get(residue_name, residue_name)


def is_peptide(residue_names: Sequence[str]) -> bool:
    """Whether every residue is an amino acid or a cap."""
    return all(standard_name(name) in AMINO_ACIDS | CAPS for name in residue_names)


def bond_orders(atoms: NamedAtoms) -> np.ndarray:
    """Order [E] of every bond: 1, 2, 4 (aromatic), 0 where a residue is not known."""
    return np.array([_order(atoms, int(i), int(j)) for i, j in atoms.bonds], dtype=np.int64)


def formal_charges(atoms: NamedAtoms, orders: np.ndarray) -> np.ndarray:
    """Formal charge [N] in e from valence; all 0 without hydrogens, since valence then says nothing."""
    charges = np.zeros(len(atoms.elements), dtype=np.int64)
    if not (atoms.elements == 1).any():
        return charges
    valence = np.zeros(len(atoms.elements), dtype=np.int64)
    for (i, j), order in zip(atoms.bonds, orders, strict=True):
        valence[[i, j]] += order
    for i, element in enumerate(atoms.elements):
        if int(element) in _VALENCE and is_peptide([atoms.residue_names[i]]) and not _in_ring(atoms, i):
            charges[i] = valence[i] - _VALENCE[int(element)]
    for members in _residues(atoms).values():
        if {"HD1", "HE2", "ND1", "NE2"} <= set(members):
            charges[members["ND1"]] = 1
    return charges


def stereocentres(atoms: NamedAtoms, positions: np.ndarray) -> np.ndarray:
    """Rows [C, 4] (centre, a, b, c) whose signed volume is positive in `positions` [N, 3] Å.

    C-alpha as (N, C, CB) for L residues, and C-beta of threonine and isoleucine: heavy neighbours alone, so that the
    rows outlive the removal of hydrogens. Incomplete residues are left out.
    """
    rows = [row for _, row in _candidate_centres(atoms)]
    found = np.array(rows, dtype=np.int64).reshape(-1, 4)
    inverted = signed_volumes(positions, found) < 0
    found[inverted] = found[inverted][:, [0, 2, 1, 3]]
    return found


def signed_volumes(positions: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Signed volume [C] in Å^3 of rows (centre, a, b, c) [C, 4] in `positions` [N, 3] Å."""
    a, b, c = (positions[centres[:, k]] - positions[centres[:, 0]] for k in (1, 2, 3))
    return np.einsum("ij,ij->i", a, np.cross(b, c))


def require_natural_chirality(name: str, atoms: NamedAtoms, positions: np.ndarray) -> None:
    """Raise InvalidSystemError naming the first centre that is not L (C-alpha), 3R (Thr) or 3S (Ile)."""
    for label, row in _candidate_centres(atoms):
        volume = float(signed_volumes(positions, np.array([row]))[0])
        if volume <= 0:
            raise InvalidSystemError(f"system {name!r}: {label} has the mirror-image configuration ({volume:.2f} Å^3)")


def _candidate_centres(atoms: NamedAtoms) -> list[tuple[str, tuple[int, ...]]]:
    found = []
    for index, members in _residues(atoms).items():
        name = standard_name(atoms.residue_names[next(iter(members.values()))])
        if name not in AMINO_ACIDS:
            continue
        for centre, around in (_ALPHA, *_SIDE_CHAIN_CENTRES.get(name, ())):
            if {centre, *around} <= set(members):
                found.append((f"{name}{index + 1}:{centre}", (members[centre], *(members[a] for a in around))))
    return found


def _residues(atoms: NamedAtoms) -> dict[int, dict[str, int]]:
    members: dict[int, dict[str, int]] = {}
    for i, (residue, name) in enumerate(zip(atoms.residue_index, atoms.atom_names, strict=True)):
        members.setdefault(int(residue), {})[name] = i
    return members


def _in_ring(atoms: NamedAtoms, i: int) -> bool:
    return atoms.atom_names[i] in _RINGS.get(standard_name(atoms.residue_names[i]), frozenset())


def _order(atoms: NamedAtoms, i: int, j: int) -> int:
    if not is_peptide([atoms.residue_names[i], atoms.residue_names[j]]):
        return 0
    if atoms.residue_index[i] != atoms.residue_index[j]:
        return _SINGLE
    pair = {atoms.atom_names[i], atoms.atom_names[j]}
    if pair == {"C", "O"} or pair == set(_DOUBLE_BONDS.get(standard_name(atoms.residue_names[i]), ())):
        return _DOUBLE
    return _AROMATIC if _in_ring(atoms, i) and _in_ring(atoms, j) else _SINGLE
