"""Structure and molecule files: what is kept, what is completed, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dig_scale.config import SystemSpec
from dig_scale.errors import UserError
from dig_scale.importers import residues, system_from_spec
from dig_scale.importers.protein import system_from_structure
from dig_scale.system import System, SystemKind


def _of_file(path: Path) -> System:
    return system_from_spec(SystemSpec(name=path.stem, file=path))


def _of_smiles(smiles: str) -> System:
    return system_from_spec(SystemSpec(name="m", smiles=smiles))


def _without_side_chains(source: Path, target: Path) -> Path:
    kept = [
        line
        for line in source.read_text().splitlines()
        if line[:4] != "ATOM" or line[12:16].strip() in ("N", "CA", "C", "O")
    ]
    target.write_text("\n".join(kept) + "\n")
    return target


def test_missing_side_chains_are_rebuilt_with_the_right_hand(shared_data: Path, tmp_path: Path) -> None:
    whole = _of_file(shared_data / "bioemu_tests" / "chignolin.pdb")
    rebuilt = _of_file(_without_side_chains(shared_data / "bioemu_tests" / "chignolin.pdb", tmp_path / "bare.pdb"))
    for system in (whole, rebuilt):
        assert len(set(zip(system.residue_index, system.atom_names, strict=True))) == system.n_sites == 138
    assert sorted(rebuilt.atom_names) == sorted(whole.atom_names)
    assert len(rebuilt.bonds) == len(whole.bonds)
    volumes = residues.signed_volumes(rebuilt.reference_positions, rebuilt.stereocentres)
    named = residues.NamedAtoms(
        rebuilt.elements, rebuilt.atom_names, rebuilt.residue_names, rebuilt.residue_index, rebuilt.bonds
    )
    residues.require_natural_chirality("rebuilt", named, rebuilt.reference_positions)
    assert len(volumes) == 9


def test_disulphides_of_a_crystal_structure_are_bonded_and_all_residues_are_l(shared_data: Path) -> None:
    system = _of_file(shared_data / "mdtraj_tests" / "2EQQ.pdb")
    named = residues.NamedAtoms(
        system.elements, system.atom_names, system.residue_names, system.residue_index, system.bonds
    )
    residues.require_natural_chirality("2EQQ", named, system.reference_positions)
    sulphurs = system.elements[system.bonds] == 16
    assert sulphurs.all(axis=1).sum() >= 1


def test_water_is_dropped_and_said(shared_data: Path) -> None:
    system = _of_file(shared_data / "mdtraj_tests" / "alanine-dipeptide-explicit.pdb")
    assert system.n_sites == 22
    assert sum(system.origin["dropped"].values()) > 700


def _altered(source: Path, target: Path, old: str, new: str) -> Path:
    target.write_text(source.read_text().replace(old, new))
    return target


def test_unknown_residue_is_refused_by_name(shared_data: Path, tmp_path: Path) -> None:
    path = _altered(shared_data / "bioemu_tests" / "chignolin.pdb", tmp_path / "odd.pdb", "TRP", "XYZ")
    with pytest.raises(UserError, match=r"odd\.pdb.*XYZ \(chain A"):
        _of_file(path)


def test_broken_chain_is_refused_by_residue(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "bioemu_tests" / "chignolin.pdb"
    kept = [line for line in source.read_text().splitlines() if " PRO A" not in line and " GLU A" not in line]
    (tmp_path / "gap.pdb").write_text("\n".join(kept) + "\n")
    with pytest.raises(UserError, match="broken between ASP2 and THR5"):
        _of_file(tmp_path / "gap.pdb")


def test_file_that_is_no_structure_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.pdb").write_text("hello\n")
    with pytest.raises(UserError, match=r"note\.pdb"):
        system_from_structure("note", tmp_path / "note.pdb")
    with pytest.raises(UserError, match="no known format"):
        _of_file(tmp_path / "note.docx")


def test_sdf_keeps_its_coordinates_and_configuration(shared_data: Path) -> None:
    system = _of_file(shared_data / "complexes" / "diffdock" / "6o5u_ligand.sdf")
    assert system.kind is SystemKind.MOLECULE
    assert system.formal_charges.sum() == 4
    assert len(system.stereocentres) == 15
    assert (residues.signed_volumes(system.reference_positions, system.stereocentres) > 0).all()


def test_unsanitisable_sdf_names_file_and_atom(shared_data: Path) -> None:
    with pytest.raises(UserError, match=r"1cbr_ligand\.sdf: atom 15 \(C\).*valence"):
        _of_file(shared_data / "complexes" / "diffdock" / "1cbr_ligand.sdf")


def test_file_of_many_molecules_is_refused(shared_data: Path) -> None:
    with pytest.raises(UserError, match="molecules, expected 1"):
        _of_file(shared_data / "fep_pockets" / "cdk2" / "02_ligands" / "ligands.sdf")


def test_smiles_of_mirror_images_give_mirror_geometries() -> None:
    left, right = _of_smiles("C[C@H](N)C(=O)O"), _of_smiles("C[C@@H](N)C(=O)O")
    assert left.stereocentres.tolist() != right.stereocentres.tolist()
    assert sorted(left.stereocentres[0]) == sorted(right.stereocentres[0])
    for system in (left, right):
        assert residues.signed_volumes(system.reference_positions, system.stereocentres)[0] > 1.0


def test_smiles_geometry_has_sane_bonds_and_orders() -> None:
    system = _of_smiles("c1ccccc1C#N")
    lengths = np.linalg.norm(np.subtract(*system.reference_positions[system.bonds.T]), axis=-1)
    assert sorted(set(system.bond_orders.tolist())) == [1, 3, 4]
    assert lengths.min() > 1.0
    assert lengths.max() < 1.6


@pytest.mark.parametrize(
    ("smiles", "named"),
    [
        ("CC(N)C(=O)O", r"C \(atom 2\)"),
        ("C(C)(C)(C)(C)C", "atom 1"),
        ("not smiles", "is not a SMILES"),
        ("c1cccc1", "atoms 1, 2"),
    ],
)
def test_bad_smiles_names_the_atom(smiles: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        _of_smiles(smiles)
