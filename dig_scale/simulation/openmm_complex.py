"""A ligand in its pocket as a recipe names it: all atoms are simulated, the pocket System's sites alone are kept.

In: a ComplexSpec and config.Simulate. Out: the System that importers.pocket makes of the same files, which training and
sampling know, and the Model of openmm_pocket with hydrogens, caps and completed side chains; its `solute` says which
particle each site is. Heavy atoms of the pocket stay where the structure has them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from dig_scale.config import ComplexSpec, Simulate
from dig_scale.importers.molecule import molecule_names, read_molecules
from dig_scale.importers.pocket import PocketOptions, place_of_ligands, pocket_system
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.force_field import mmff_variant
from dig_scale.simulation.openmm_pocket import pocket_complex, posed_ligands
from dig_scale.simulation.openmm_systems import Model, build_openmm_system
from dig_scale.system import System

_SAME_PLACE = 0.02
"""Å; both readers take heavy atoms from the same file, of 1e-3 Å."""


def complex_system(name: str, spec: ComplexSpec, simulate: Simulate) -> tuple[System, Model]:
    """The pocket System of an entry and the Model that moves it; raises UserError naming the file, the ligand or the site."""
    protein, ligands = (_file(name, path) for path in (spec.protein, spec.ligand))
    ligand = spec.name_of_ligand or _only_ligand(name, ligands)
    place = place_of_ligands(ligands, spec.defined_by)
    options = PocketOptions(cutoff=spec.cutoff, shell=spec.shell, place=place)
    system, frames = pocket_system(protein, ligands, ligand, options)
    whole = pocket_complex(name, protein, posed_ligands(ligands)[ligand], spec.cutoff, place)
    _require_mmff(whole, simulate)
    sites = _particles(name, system, frames.positions[0], whole)
    return replace(system, name=name), Model(build_openmm_system(whole, simulate), whole.reference_positions, sites)


def _file(name: str, path: Path) -> Path:
    if "$" in str(path):
        raise SimulationError(f"system {name!r}: {path} names an environment variable that is not set")
    if not path.is_file():
        raise SimulationError(f"system {name!r}: there is no file {path}")
    return path


def _only_ligand(name: str, path: Path) -> str:
    names = molecule_names(read_molecules(path))
    if len(names) != 1:
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise SimulationError(
            f"system {name!r}: {path} holds {len(names)} molecules; give complex.name_of_ligand, one of {listed}"
        )
    return names[0]


def _require_mmff(whole: System, simulate: Simulate) -> None:
    if mmff_variant(whole, simulate) is None:
        raise SimulationError(
            f"system {whole.name!r}: a ligand in its pocket is simulated with MMFF; leave simulate.force_field out or set it "
            f'to ["mmff94"], not {list(simulate.force_field)}'
        )
    if simulate.explicit_solvent is not None:
        raise SimulationError(
            f"system {whole.name!r}: a ligand in a pocket that is cut out of its protein has no box of water; leave "
            f'simulate.explicit_solvent out and set simulate.implicit_solvent = "obc2" or "none"'
        )


def _particles(name: str, system: System, positions: np.ndarray, whole: System) -> np.ndarray:
    """The particle [N] of every site, the one at its place."""
    from scipy.spatial import cKDTree

    heavy = whole.heavy_sites()
    distances, nearest = cKDTree(whole.reference_positions[heavy]).query(positions)
    particles = heavy[nearest]
    lost = np.flatnonzero((distances > _SAME_PLACE) | (whole.elements[particles] != system.elements))
    if len(lost):
        listed = ", ".join(system.site_label(int(site)) for site in lost[:4])
        raise SimulationError(
            f"system {name!r}: {len(lost)} sites of the pocket ({listed}) are not among the amino acids that MMFF simulates; "
            f"remove metals and other molecules from {system.origin['source']}, or import poses instead"
        )
    return np.asarray(particles)
