"""Missing heavy atoms of standard residues, placed rigidly from residue templates by a proper rotation.

In: an OpenMM topology, positions in Å, and PDBFixer's list of what is missing. Out: a topology and positions with all
heavy atoms. PDBFixer's own placement superimposes without excluding reflections, and a backbone is nearly planar, so it
can turn an L residue into a D one; that is why the placement stands here. Does not add residues or hydrogens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dig_scale.errors import UserError
from dig_scale.units import ANGSTROM_PER_NM

if TYPE_CHECKING:
    from openmm.app import Topology
    from pdbfixer import PDBFixer

_ANCHORS = ("N", "CA", "C", "CH3")


def complete_heavy_atoms(fixer: PDBFixer, source: str) -> tuple[Topology, np.ndarray]:
    """Topology with standard bonds and positions [N, 3] Å; raises UserError when a residue has too few atoms to place."""
    from openmm import app

    fixer.missingResidues = {}
    fixer.findMissingAtoms()
    old = np.array([[p.x, p.y, p.z] for p in fixer.positions]) * ANGSTROM_PER_NM
    topology, positions = app.Topology(), []
    for chain in fixer.topology.chains():
        new_chain = topology.addChain(chain.id)
        for residue in chain.residues():
            new_residue = topology.addResidue(residue.name, new_chain, residue.id, residue.insertionCode)
            for name, element, position in _heavy_atoms(fixer, residue, old, source):
                topology.addAtom(name, element, new_residue)
                positions.append(position)
    placed = np.array(positions)
    topology.createStandardBonds()
    topology.createDisulfideBonds(_vectors(placed))
    return topology, placed


def proper_superposition(mobile: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotation [3, 3] (determinant +1) and shift [3] that bring points `mobile` [M, 3] onto `target` [M, 3]."""
    mobile_centre, target_centre = mobile.mean(axis=0), target.mean(axis=0)
    u, _, vt = np.linalg.svd((mobile - mobile_centre).T @ (target - target_centre))
    handedness = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    rotation = (u @ handedness @ vt).T
    return rotation, target_centre - rotation @ mobile_centre


def _heavy_atoms(fixer: PDBFixer, residue: Any, old: np.ndarray, source: str) -> list[tuple[str, Any, np.ndarray]]:
    from openmm.app import element

    atoms = [(a.name, a.element, old[a.index]) for a in residue.atoms() if a.element is not element.hydrogen]
    missing = [atom.name for atom in fixer.missingAtoms.get(residue, [])]
    if missing:
        atoms += _from_template(fixer, residue, atoms, missing, source)
    for name in fixer.missingTerminals.get(residue, []):
        if name == "OXT":
            here = {atom: position for atom, _, position in atoms}
            atoms.append(("OXT", element.oxygen, _second_oxygen(here["CA"], here["C"], here["O"])))
    return atoms


def _from_template(
    fixer: PDBFixer, residue: Any, atoms: list[tuple[str, Any, np.ndarray]], missing: list[str], source: str
) -> list[tuple[str, Any, np.ndarray]]:
    """A missing carbonyl O is placed last, by itself: the template's backbone torsion is not the residue's."""
    template = fixer.templates[residue.name]
    shape = {
        atom.name: (atom.element, np.array([p.x, p.y, p.z]) * ANGSTROM_PER_NM)
        for atom, p in zip(template.topology.atoms(), template.positions, strict=True)
    }
    here = {name: position for name, _, position in atoms}
    side_chain_begun = [name for name in here if name in shape and name not in ("O", *_ANCHORS)]
    anchors = [
        name
        for name in (*_ANCHORS, *side_chain_begun, *(["O"] if residue.name == "ACE" else []))
        if name in here and name in shape
    ]
    if len(anchors) < 3:
        raise UserError(
            f"{source}: {residue.name} (chain {residue.chain.id}, residue {residue.id}) has only {', '.join(here)}; at "
            f"least N, CA and C are needed to place the rest: complete or remove the residue"
        )
    rotation, shift = proper_superposition(
        np.array([shape[name][1] for name in anchors]), np.array([here[name] for name in anchors])
    )
    return [(name, shape[name][0], rotation @ shape[name][1] + shift) for name in missing]


def _second_oxygen(alpha: np.ndarray, carbon: np.ndarray, oxygen: np.ndarray) -> np.ndarray:
    """The mirror image of a carboxylate oxygen across the CA-C axis."""
    axis = (carbon - alpha) / np.linalg.norm(carbon - alpha)
    along = axis * float((oxygen - carbon) @ axis)
    return carbon + 2 * along - (oxygen - carbon)


def _vectors(positions: np.ndarray) -> Any:
    from openmm import Vec3, unit

    return [Vec3(*row) for row in positions / ANGSTROM_PER_NM] * unit.nanometer
