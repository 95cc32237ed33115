"""A ligand with the residues around it is one MMFF molecule with RDKit's energy, and the pocket stays in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rdkit.Chem import rdForceFieldHelpers

from dig_scale.config import Simulate
from dig_scale.importers.molecule import rdkit_molecule
from dig_scale.importers.residues import is_peptide, signed_volumes
from dig_scale.simulation.engine import PhaseSpace, SimulationError
from dig_scale.simulation.mmff import parametrised
from dig_scale.simulation.openmm_engine import OpenMMEngine
from dig_scale.simulation.openmm_pocket import pocket_complex, posed_ligands
from dig_scale.system import SiteRole, System
from tests.dig_scale.simulation.test_mmff import of_openmm, of_rdkit, with_positions


def first_complex(folder: Path, radius: float) -> System:
    ligand = next(iter(posed_ligands(folder / "02_ligands" / "ligands.sdf").values()))
    return pocket_complex(folder.name, folder / "01_protein" / "crd" / "protein.pdb", ligand, radius)


@pytest.fixture(scope="module")
def mcl1(shared_data: Path) -> System:
    return first_complex(shared_data / "fep_pockets" / "mcl1", 4.0)


@pytest.mark.parametrize(("target", "radius"), [("eg5", 4.0), ("cdk2", 5.0)])
def test_complex_has_the_energy_and_gradient_of_rdkit(target: str, radius: float, shared_data: Path) -> None:
    system = first_complex(shared_data / "fep_pockets" / target, radius)
    assert system.n_sites > 400
    solid = with_positions(rdkit_molecule(system), system.reference_positions)
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(solid)
    energy, gradient = of_openmm(parametrised(target, solid).openmm_system(), system.reference_positions)
    expected_energy, expected_gradient = of_rdkit(solid, system.reference_positions, properties)
    assert energy == pytest.approx(expected_energy, abs=1e-4)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-3)


@pytest.mark.slow
def test_pocket_of_ten_angstrom_has_the_energy_of_rdkit(shared_data: Path) -> None:
    """RDKit leaves out torsions above 1000 bonds between inner atoms; this pocket has fewer."""
    test_complex_has_the_energy_and_gradient_of_rdkit("mcl1", 10.0, shared_data)


def test_ligand_comes_first_and_pocket_atoms_are_those_of_the_crystal(mcl1: System, shared_data: Path) -> None:
    ligand = mcl1.roles == SiteRole.LIGAND
    assert np.flatnonzero(ligand).tolist() == list(range(int(ligand.sum())))
    assert mcl1.mobile[ligand].all()
    np.testing.assert_array_equal(mcl1.mobile[~ligand], mcl1.elements[~ligand] == 1)
    assert is_peptide([name for name, is_ligand in zip(mcl1.residue_names, ligand, strict=True) if not is_ligand])
    lines = (shared_data / "fep_pockets" / "mcl1" / "01_protein" / "crd" / "protein.pdb").read_text().splitlines()
    crystal = np.array([[float(line[k : k + 8]) for k in (30, 38, 46)] for line in lines if line.startswith("ATOM")])
    heavy = mcl1.reference_positions[~mcl1.mobile]
    nearest = np.linalg.norm(heavy[:, None] - crystal[None], axis=-1).min(axis=1)
    assert nearest.max() < 2e-3
    assert (signed_volumes(mcl1.reference_positions, mcl1.stereocentres) > 0).all()


def test_pieces_of_the_chain_are_capped_and_no_valence_is_open(mcl1: System) -> None:
    for chain in np.unique(mcl1.chain_index[mcl1.roles == SiteRole.POCKET]):
        members = np.flatnonzero((mcl1.chain_index == chain) & (mcl1.roles == SiteRole.POCKET))
        assert mcl1.residue_names[members[0]] == "ACE" and mcl1.residue_names[members[-1]] == "NME"
    assert not any(atom.GetNumRadicalElectrons() for atom in rdkit_molecule(mcl1).GetAtoms())


def test_dynamics_moves_the_ligand_and_leaves_the_pockets_heavy_atoms(shared_data: Path) -> None:
    system = first_complex(shared_data / "fep_pockets" / "mcl1", 3.5)
    simulate = Simulate(time_step_fs=2.0, implicit_solvent="none")
    engine = OpenMMEngine(system, simulate, 300.0, "Reference")
    engine.restore(PhaseSpace(system.reference_positions, np.zeros((system.n_sites, 3)), 0), 1)
    positions = engine.advance(5).positions[0]
    np.testing.assert_allclose(positions[~system.mobile], system.reference_positions[~system.mobile], atol=1e-9)
    moved = np.linalg.norm(positions - system.reference_positions, axis=1)
    assert moved[system.mobile].min() > 1e-4
    assert moved[system.roles == SiteRole.LIGAND].max() < 1.0


def test_empty_pocket_is_refused(mcl1: System, shared_data: Path) -> None:
    folder = shared_data / "fep_pockets" / "eg5"
    elsewhere = mcl1.select(np.flatnonzero(mcl1.roles == SiteRole.LIGAND))
    far = System.from_dict(
        elsewhere.to_dict() | {"reference_positions": (elsewhere.reference_positions + 500).tolist()}
    )
    with pytest.raises(SimulationError, match=r"no amino acid of .*protein.pdb within 4 Å"):
        pocket_complex("far", folder / "01_protein" / "crd" / "protein.pdb", far, 4.0)
