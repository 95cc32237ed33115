"""Files of samples: other programs read back the atoms, the numbers and the coordinates that were written."""

from __future__ import annotations

from pathlib import Path

import mdtraj
import numpy as np
import pytest

from dig_scale.ensemble import Ensemble
from dig_scale.errors import UserError
from dig_scale.importers.molecule import system_from_smiles
from dig_scale.importers.pocket import PocketOptions, pocket_system
from dig_scale.outputs.ensembles import write_ensemble_folder
from dig_scale.outputs.molecules import ligand_sites, pdb_text, write_sdf
from dig_scale.system import System
from tests.molecules import alanine_dipeptide_heavy, five_beads


def _ensemble(system: System, n_samples: int) -> Ensemble:
    noise = np.random.default_rng(0).normal(scale=0.05, size=(n_samples, system.n_sites, 3))
    positions = (system.reference_positions + noise).astype(np.float32)
    return Ensemble(system, positions, np.arange(n_samples) + 10, 7, energy=np.linspace(-1.5, 1.0, n_samples))


@pytest.fixture(scope="module")
def written(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ensemble, Path]:
    folder = shared_data / "fep_pockets" / "hif2a"
    protein, ligands = folder / "01_protein" / "crd" / "protein.pdb", folder / "02_ligands" / "ligands.sdf"
    system, _ = pocket_system(protein, ligands, "lig_231", PocketOptions(name="hif2a"))
    ensemble, out = _ensemble(system, 3), tmp_path_factory.mktemp("samples")
    written = {path.name for path in write_ensemble_folder(ensemble, out).iterdir()}
    assert written == {"ensemble.npz", "topology.pdb", "samples.xtc", "samples.sdf"}
    return ensemble, out


def test_rdkit_and_ase_read_the_same_poses_from_sdf(written: tuple[Ensemble, Path]) -> None:
    from rdkit import Chem

    ensemble, folder = written
    ligand = ligand_sites(ensemble.system)
    records = list(Chem.SDMolSupplier(str(folder / "samples.sdf")))
    assert len(records) == 3
    for number, record in enumerate(records):
        assert np.allclose(record.GetConformer().GetPositions(), ensemble.positions[number, ligand], atol=1e-4)
        assert record.GetPropsAsDict() == {
            "sample": 10 + number,
            "seed": 7,
            "energy_eV": pytest.approx(-1.5 + 1.25 * number),
        }
    original = Chem.MolFromSmiles(ensemble.system.origin["ligand_smiles"])
    for atom in original.GetAtoms():
        atom.SetAtomMapNum(0)
    assert Chem.CanonSmiles(Chem.MolToSmiles(records[0])) == Chem.CanonSmiles(Chem.MolToSmiles(original))
    ase_io = pytest.importorskip("ase.io")
    atoms = ase_io.read(folder / "samples.sdf", format="sdf")
    assert atoms.numbers.tolist() == ensemble.system.elements[ligand].tolist()
    assert np.allclose(atoms.positions, ensemble.positions[0, ligand], atol=1e-4)


def test_sdf_counts_line_and_bonds_are_those_of_the_system(written: tuple[Ensemble, Path]) -> None:
    ensemble, folder = written
    lines = (folder / "samples.sdf").read_text().splitlines()
    n_atoms, n_bonds = int(lines[3][:3]), int(lines[3][3:6])
    bonds = {tuple(sorted((int(row[:3]) - 1, int(row[3:6]) - 1))) for row in lines[4 + n_atoms : 4 + n_atoms + n_bonds]}
    n_ligand = len(ligand_sites(ensemble.system))
    assert n_atoms == n_ligand and lines[3].endswith("V2000")
    assert bonds == {(int(i), int(j)) for i, j in ensemble.system.bonds if j < n_ligand}


def test_pdb_and_xtc_open_together_and_keep_order(written: tuple[Ensemble, Path]) -> None:
    ensemble, folder = written
    system = ensemble.system
    trajectory = mdtraj.load(str(folder / "samples.xtc"), top=str(folder / "topology.pdb"))
    assert [atom.element.atomic_number for atom in trajectory.topology.atoms] == system.elements.tolist()
    assert np.allclose(trajectory.xyz * 10, ensemble.positions, atol=0.02)


def test_pdb_has_the_ligand_as_hetatm_and_the_numbers_of_the_structure(written: tuple[Ensemble, Path]) -> None:
    gemmi = pytest.importorskip("gemmi")
    ensemble, folder = written
    system = ensemble.system
    model = gemmi.read_structure(str(folder / "topology.pdb"))[0]
    flags = [(residue.het_flag, len(residue)) for chain in model for residue in chain]
    assert flags[0] == ("H", len(ligand_sites(system))) and {flag for flag, _ in flags[1:]} == {"A"}
    known = set(system.origin["pocket_residues"].values())
    assert {f"{chain.name}:{r.name}{r.seqid}" for chain in model for r in chain if r.het_flag == "A"} == known
    text = (folder / "topology.pdb").read_text()
    partners = [line.split()[1:] for line in text.splitlines() if line.startswith("CONECT")]
    pairs = {tuple(sorted((int(row[0]) - 1, int(other) - 1))) for row in partners for other in row[1:]}
    assert pairs == {(int(i), int(j)) for i, j in system.bonds if j < len(ligand_sites(system))}


def test_small_molecule_with_hydrogens_comes_back_whole(tmp_path: Path) -> None:
    from rdkit import Chem

    system = system_from_smiles("indole", "O=C([O-])c1c[nH]c2ccccc12")
    write_ensemble_folder(_ensemble(system, 2), tmp_path)
    [first, _] = Chem.SDMolSupplier(str(tmp_path / "samples.sdf"), removeHs=False)
    assert first.GetNumAtoms() == system.n_sites
    assert Chem.MolToSmiles(Chem.RemoveHs(first)) == Chem.CanonSmiles("O=C([O-])c1c[nH]c2ccccc12")


@pytest.mark.parametrize("system", [alanine_dipeptide_heavy(), five_beads()], ids=["peptide", "beads"])
def test_peptides_and_beads_have_no_sdf(system: System, tmp_path: Path) -> None:
    write_ensemble_folder(_ensemble(system, 2), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"ensemble.npz", "topology.pdb", "samples.xtc"}
    assert mdtraj.load(str(tmp_path / "topology.pdb")).n_atoms == system.n_sites


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    system = alanine_dipeptide_heavy()
    with pytest.raises(UserError, match="beyond 9999"):
        pdb_text(system, system.reference_positions + 2e4)
    with pytest.raises(UserError, match="not finite"):
        pdb_text(system, system.reference_positions * np.nan)
    with pytest.raises(UserError, match="property 'x' has 1 values for 2 samples"):
        write_sdf(tmp_path / "a.sdf", system, np.zeros((2, system.n_sites, 3)), {"x": [1.0]})
