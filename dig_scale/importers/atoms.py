"""Atoms of a topology (OpenMM's, PDBFixer's) with their bonds and places -> a System with all that residues tell of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dig_scale.importers import residues
from dig_scale.system import System, SystemKind


def system_of_atoms(
    name: str, atoms: Sequence[Any], bonds: np.ndarray, positions: np.ndarray, origin: dict[str, Any]
) -> System:
    """A System whose sites are these atoms, all mobile; bonds [E, 2] number them with i < j, positions [N, 3] Å."""
    named = residues.NamedAtoms(
        elements=np.array([atom.element.atomic_number for atom in atoms]),
        atom_names=tuple(atom.name for atom in atoms),
        residue_names=tuple(atom.residue.name for atom in atoms),
        residue_index=np.array([atom.residue.index for atom in atoms]),
        bonds=bonds,
    )
    orders = residues.bond_orders(named)
    return System(
        name=name,
        kind=SystemKind.MOLECULE,
        elements=named.elements,
        atom_names=named.atom_names,
        residue_names=named.residue_names,
        residue_index=named.residue_index,
        chain_index=np.array([atom.residue.chain.index for atom in atoms]),
        bonds=named.bonds,
        bond_orders=orders,
        formal_charges=residues.formal_charges(named, orders),
        stereocentres=residues.stereocentres(named, positions),
        mobile=np.ones(len(atoms), dtype=bool),
        reference_positions=positions,
        origin=origin,
    )


def bonds_of(pairs: Iterable[tuple[Any, Any]]) -> np.ndarray:
    """Bonds [E, 2], i < j, each once, of pairs of atoms with an `index`."""
    listed = [sorted((one.index, other.index)) for one, other in pairs]
    return np.unique(np.array(listed, dtype=np.int64).reshape(-1, 2), axis=0)
