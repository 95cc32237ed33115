"""Physical filters: which samples can be structures at all, and of the others how many fail for which reason.

In: an Ensemble. Out: a Validity. What is looked at follows from what the ensemble holds, with the measures of its report:
residue frames  chain breaks and collapsed steps along the chain, clashes of the backbone (proteins.soundness)
a cell each     cells without room, sites on top of each other (crystals.are_plausible)
atoms, beads    bond lengths against the reference geometry, clashes, inverted stereocentres; of a ligand in a pocket also
                clashes between the two, of a slab clashes by covalent radii with images
A sample that fails for several reasons counts for each. Knows no model and no reference data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dig_scale.ensemble import Ensemble
from dig_scale.evaluation import crystals, poses, proteins, structure
from dig_scale.evaluation.geometry_tables import BOND_TOLERANCE
from dig_scale.outputs.molecules import ligand_sites, pocket_sites
from dig_scale.system import COARSE_GRAINED_BEAD, Frames, System

NOT_FINITE = "not finite"
BOND = "bond off"
CLASH = "clash"
STEREO = "stereochemistry inverted"
CHAIN_BREAK = "chain break"
NO_ROOM = "cell without room"
BEAD_BOND_TOLERANCE = 0.15
"""Of the length: bonds of coarse-grained beads stand for several and vary more than atoms' bonds."""
COVALENT_CLASH_FACTOR = 0.6
"""Of the sum of covalent radii, for atoms that may bond with each other though no bond is listed: those of slabs."""


@dataclass(frozen=True)
class Validity:
    """By reason, which samples [S] fail."""

    failed: Mapping[str, np.ndarray]

    @property
    def valid(self) -> np.ndarray:
        """Samples [S] that fail for no reason."""
        return ~np.any(list(self.failed.values()), axis=0)

    @property
    def acceptance(self) -> float:
        """Fraction of valid samples; NaN of none."""
        return float(self.valid.mean()) if len(self.valid) else float("nan")

    def counts(self) -> dict[str, int]:
        """Samples that fail, by reason; of one that fails for several, in each."""
        return {reason: int(rows.sum()) for reason, rows in self.failed.items()}

    def in_words(self) -> str:
        """As in '93 of 100 valid (93.0 %); clash 5, bond off 3'."""
        told = ", ".join(f"{reason} {count}" for reason, count in self.counts().items() if count)
        rate = f" ({100 * self.acceptance:.1f} %)" if len(self.valid) else ""
        return f"{int(self.valid.sum())} of {len(self.valid)} valid{rate}" + (f"; {told}" if told else "")


def validity(ensemble: Ensemble) -> Validity:
    """What is wrong with every sample; reasons that do not apply to the kind of system are left out."""
    arrays = [x for x in (ensemble.positions, ensemble.rotations, ensemble.cell) if x is not None]
    finite = np.all([np.isfinite(x).reshape(len(x), -1).all(1) for x in arrays], axis=0)
    found = _failures(ensemble, np.flatnonzero(finite))
    rows: dict[str, np.ndarray] = {NOT_FINITE: np.asarray(~finite)}
    for reason, failed in found.items():
        rows[reason] = np.zeros(len(finite), bool)
        rows[reason][finite] = failed
    return Validity(rows)


def _failures(ensemble: Ensemble, rows: np.ndarray) -> dict[str, np.ndarray]:
    """By reason, which of the finite samples `rows` [M] fail."""
    system, positions = ensemble.system, ensemble.positions[rows]
    if ensemble.rotations is not None:
        return _of_residues(system, positions, ensemble.rotations[rows])
    if ensemble.cell is not None:
        return _of_crystals(system, Frames(positions, ensemble.index[rows].astype(float), cell=ensemble.cell[rows]))
    found = {BOND: _bonds_off(system, positions)}
    found[CLASH] = _slab_clashes(system, positions) if system.cell is not None else _clashes(system, positions)
    if len(system.stereocentres):
        inverted = structure.signed_volumes(positions, system.stereocentres) <= 0
        found[STEREO] = np.asarray(inverted.any(axis=1))
    return found


def _of_residues(system: System, positions: np.ndarray, rotations: np.ndarray) -> dict[str, np.ndarray]:
    limits = proteins.PhysicalLimits()
    found = proteins.soundness(system, positions, rotations, limits)
    far = (found.longest_ca_step >= limits.ca_step) | (found.longest_peptide_bond >= limits.peptide_bond)
    return {
        CHAIN_BREAK: far,
        BOND: found.shortest_ca_step <= limits.shortest_ca_step,
        CLASH: found.atom_clashes > 0,
    }


def _of_crystals(system: System, frames: Frames) -> dict[str, np.ndarray]:
    roomy = crystals.are_plausible(system, frames, crystals.Plausible(shortest_distance=0.0))
    return {NO_ROOM: ~roomy, CLASH: roomy & ~crystals.are_plausible(system, frames)}


def _bonds_off(system: System, positions: np.ndarray) -> np.ndarray:
    """Samples [M] with a bond longer or shorter than in the reference geometry by more than the tolerance."""
    if not len(system.bonds):
        return np.zeros(len(positions), bool)
    expected = structure.bond_lengths(system.reference_positions[None], system.bonds)
    beads = (system.elements[system.bonds] == COARSE_GRAINED_BEAD).any(axis=1)
    tolerance = np.where(beads, np.maximum(BOND_TOLERANCE, BEAD_BOND_TOLERANCE * expected), BOND_TOLERANCE)
    off = np.abs(structure.bond_lengths(positions, system.bonds) - expected) > tolerance
    return np.asarray(off.any(axis=1))


def _clashes(system: System, positions: np.ndarray) -> np.ndarray:
    pocket = pocket_sites(system)
    if not len(pocket):
        return structure.clash_counts(positions, system) > 0
    ligand = ligand_sites(system)
    inside = structure.clash_counts(positions[:, ligand], system.select(ligand)) > 0
    # a receptor may come with contacts of its own, which are none of the samples' making
    around = system.select(pocket)
    native = structure.clash_counts(around.reference_positions[None], around)[0]
    worse = structure.clash_counts(positions[:, pocket], around) > native
    return np.asarray(inside | worse | (poses.pocket_clashes(system, positions) > 0))


def _slab_clashes(system: System, positions: np.ndarray) -> np.ndarray:
    assert system.cell is not None
    cells = np.broadcast_to(system.cell, (len(positions), 3, 3))
    frames = Frames(positions, np.arange(len(positions), dtype=float), cell=cells)
    return np.asarray((crystals.coordination(system, frames, COVALENT_CLASH_FACTOR) > 0).any(axis=1))
