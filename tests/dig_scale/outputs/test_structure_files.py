"""Files of periodic structures: ASE, pymatgen and gemmi read back cells, atoms, energies, labels, tags and constraints."""

from __future__ import annotations

from pathlib import Path

import ase.io
import gemmi
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from pymatgen.core import Structure

from dig_scale.ensemble import Ensemble
from dig_scale.errors import UserError
from dig_scale.importers.catalyst import read_catalyst
from dig_scale.importers.crystal import crystal_system
from dig_scale.outputs.ensembles import is_complete, write_ensemble_folder
from dig_scale.outputs.structures import write_cif, write_extended_xyz
from dig_scale.system import Frames, SiteRole
from tests.kinds import case


def rattled(seed: int) -> Atoms:
    atoms = bulk("C", "diamond", 3.567, cubic=True)
    atoms.rattle(0.1, seed=seed)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.05 * np.triu(np.ones((3, 3)))), scale_atoms=True)
    return atoms


CARBON = crystal_system(rattled(1).numbers)
FRAMES = Frames(
    np.stack([rattled(k).positions for k in (1, 2)]),
    np.arange(2.0),
    np.array([-70.5, -71.25]),
    cell=np.stack([rattled(k).cell.array for k in (1, 2)]),
    labels={"band gap": np.array([5.5, 0])},
)


def test_cif_is_read_back_by_ase_pymatgen_and_gemmi(tmp_path: Path) -> None:
    path = write_cif(CARBON, FRAMES, tmp_path / "samples" / "all.cif")
    for k, atoms in enumerate(ase.io.read(path, index=":")):
        assert atoms.numbers.tolist() == CARBON.elements.tolist()
        ours = Atoms(CARBON.elements, FRAMES.positions[k], cell=FRAMES.cell[k], pbc=True)
        found, expected = (np.sort(one.get_all_distances(mic=True), axis=None) for one in (atoms, ours))
        np.testing.assert_allclose(found, expected, atol=1e-3)
    structure = Structure.from_str("data_" + path.read_text().split("data_")[1], fmt="cif")
    assert structure.composition.formula == "C8" and structure.volume == pytest.approx(
        rattled(1).get_volume(), rel=1e-4
    )
    document = gemmi.cif.read(str(path))
    assert [len(gemmi.make_small_structure_from_block(block).sites) for block in document] == [8, 8]


def test_extended_xyz_is_read_back_by_ase_with_energy_and_labels(tmp_path: Path) -> None:
    path = write_extended_xyz(CARBON, FRAMES, tmp_path / "all.extxyz")
    for k, atoms in enumerate(ase.io.read(path, index=":")):
        np.testing.assert_allclose(atoms.positions, FRAMES.positions[k], atol=1e-7)
        np.testing.assert_allclose(atoms.cell.array, FRAMES.cell[k], atol=1e-7)
        assert atoms.pbc.all() and atoms.get_potential_energy() == FRAMES.energy[k]
        assert atoms.info["band gap"] == FRAMES.labels["band gap"][k]


def test_structures_without_any_cell_are_refused(tmp_path: Path) -> None:
    bare = Frames(FRAMES.positions, FRAMES.time_ps)
    with pytest.raises(UserError, match="have no cell"):
        write_extended_xyz(CARBON, bare, tmp_path / "x.extxyz")


def test_samples_of_crystals_are_extended_xyz_and_cif(tmp_path: Path) -> None:
    found = case("crystal")
    positions, cells = (found.frames[name].numpy().astype(np.float32) for name in ("positions", "cell"))
    ensemble = Ensemble(found.system, positions, np.array([4, 5, 6]), 9, cell=cells)
    write_ensemble_folder(ensemble, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"ensemble.npz", "samples.extxyz", "samples.cif"}
    for k, atoms in enumerate(ase.io.read(tmp_path / "samples.extxyz", index=":")):
        np.testing.assert_allclose(atoms.positions, positions[k], atol=1e-6)
        np.testing.assert_allclose(atoms.cell.array, cells[k], atol=1e-6)
        assert (atoms.info["sample"], atoms.info["seed"]) == (4 + k, 9)
    assert len(ase.io.read(tmp_path / "samples.cif", index=":")) == 3


def test_samples_of_a_slab_keep_cell_tags_and_fixed_atoms(tmp_path: Path) -> None:
    found = case("catalyst")
    system, positions = found.system, found.frames["positions"].numpy().astype(np.float32)
    ensemble = Ensemble(system, positions, np.arange(3), 1, energy=np.array([-1.0, -2.0, -3.0]))
    write_ensemble_folder(ensemble, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"ensemble.npz", "samples.extxyz", "topology.pdb"}
    frames = ase.io.read(tmp_path / "samples.extxyz", index=":")
    for k, atoms in enumerate(frames):
        np.testing.assert_allclose(atoms.positions, positions[k], atol=1e-6)
        np.testing.assert_allclose(atoms.cell.array, system.cell, atol=1e-9)
        assert atoms.pbc.tolist() == [True, True, False] and atoms.get_potential_energy() == -1.0 - k
        assert atoms.get_tags().tolist() == [0] * 4 + [1] * 4 + [2] * 2
        assert (
            np.concatenate([one.index for one in atoms.constraints]).tolist() == np.flatnonzero(~system.mobile).tolist()
        )
    assert len(gemmi.read_structure(str(tmp_path / "topology.pdb"))[0].get_all_residue_names()) == 1
    again, _ = read_catalyst("again", tmp_path / "samples.extxyz")
    assert again.roles.tolist() == system.roles.tolist() and (again.roles == SiteRole.ADSORBATE).sum() == 2


def test_a_lost_file_makes_a_folder_incomplete(tmp_path: Path) -> None:
    found = case("catalyst")
    ensemble = Ensemble(found.system, found.frames["positions"].numpy().astype(np.float32), np.arange(3), 1)
    write_ensemble_folder(ensemble, tmp_path)
    assert is_complete(ensemble, tmp_path)
    (tmp_path / "samples.extxyz").unlink()
    assert not is_complete(ensemble, tmp_path)
