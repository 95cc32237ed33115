"""Ligands in pockets: every public target loads, no pose leaks into a System, and bad input is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dig_scale.errors import UserError
from dig_scale.importers.molecule import (
    ligand_from_molecule,
    molecule_names,
    rdkit_molecule,
    read_molecules,
    system_from_sdf,
    systems_from_file,
)
from dig_scale.importers.pocket import (
    Box,
    PocketMotion,
    PocketOptions,
    centre,
    in_pocket,
    place_of_ligands,
    pocket_of,
    pocket_system,
    pocket_system_from_complex,
    pocket_system_from_smiles,
    pocket_systems,
    posed_in_pocket,
)
from dig_scale.importers.receptor import LigandResidue
from dig_scale.importers.residues import signed_volumes
from dig_scale.system import Frames, SiteRole, System

TARGETS = ("cdk2", "cdk8", "cmet", "eg5", "hif2a", "mcl1", "pfkfb3", "ptp1b", "syk", "thrombin")
GG2 = "COc1ccc(-n2nc(C(N)=O)c3c2C(=O)N(c2ccc(N4CCCCC4=O)cc2)CC3)cc1"
METHANOL_MOL2 = """@<TRIPOS>MOLECULE
{name}
 6 5 0 0 0
SMALL
NO_CHARGES

@<TRIPOS>ATOM
 1 C1 -0.374 0.009 0.020 C.3 1 LIG 0.0
 2 O1 0.898 -0.567 -0.217 O.3 1 LIG 0.0
 3 H1 -0.976 -0.711 0.615 H 1 LIG 0.0
 4 H2 -0.899 0.167 -0.945 H 1 LIG 0.0
 5 H3 -0.231 0.956 0.580 H 1 LIG 0.0
 6 H4 1.429 -0.440 0.607 H 1 LIG 0.0
@<TRIPOS>BOND
 1 1 2 1
 2 1 3 1
 3 1 4 1
 4 1 5 1
 5 2 6 1
"""


def _files(shared_data: Path, target: str) -> tuple[Path, Path]:
    folder = shared_data / "fep_pockets" / target
    return folder / "01_protein" / "crd" / "protein.pdb", folder / "02_ligands" / "ligands.sdf"


def _complex(shared_data: Path, name: str) -> tuple[Path, Path]:
    folder = shared_data / "complexes" / "diffdock"
    return folder / f"{name}_protein_processed.pdb", folder / f"{name}_ligand.sdf"


def _check(system: System, frames: Frames) -> None:
    ligand, pocket = (np.flatnonzero(system.roles == role) for role in (SiteRole.LIGAND, SiteRole.POCKET))
    assert ligand.tolist() == list(range(len(ligand))) and len(ligand) + len(pocket) == system.n_sites
    assert (system.elements > 1).all()
    for geometry in (frames.positions[0], system.reference_positions):
        lengths = np.linalg.norm(np.subtract(*geometry[system.bonds.T]), axis=-1)
        assert lengths.min() > 1.0 and lengths.max() < 2.4
        assert (signed_volumes(geometry, system.stereocentres) > 0).all()
    assert not set(system.residue_index[ligand]) & set(system.residue_index[pocket])
    assert np.array_equal(frames.positions[0][pocket], system.reference_positions[pocket])
    own, around = (system.reference_positions[part].mean(axis=0) for part in (ligand, pocket))
    assert np.allclose(own, around, atol=1e-3)
    assert not (np.isin(system.bonds, ligand).sum(axis=1) == 1).any()


@pytest.mark.parametrize("target", TARGETS)
def test_every_ligand_of_a_public_target_lies_in_its_pocket(shared_data: Path, target: str) -> None:
    protein, ligands = _files(shared_data, target)
    molecules = read_molecules(ligands)
    names = molecule_names(molecules)
    pocket = pocket_of(protein, place_of_ligands(ligands), PocketOptions(name=target))
    assert 60 <= len(np.unique(pocket.system.residue_index)) <= 95
    for name, molecule in list(zip(names, molecules, strict=True))[:1]:
        system, frames = posed_in_pocket(ligand_from_molecule(name, molecule, {}), pocket)
        _check(system, frames)
        assert system.name == f"{target}-{name}"
    for molecule in molecules:
        heavy = np.array(molecule.GetConformer().GetPositions())[[a.GetAtomicNum() > 1 for a in molecule.GetAtoms()]]
        distances = np.linalg.norm(heavy[:, None] - pocket.system.reference_positions, axis=-1).min(axis=1)
        assert 1.5 < distances.min() < 5.0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_ligand_of_a_public_target_becomes_a_system(shared_data: Path, target: str) -> None:
    for system, frames in pocket_systems(*_files(shared_data, target)):
        _check(system, frames)


def test_the_system_says_nothing_of_where_its_ligand_lies(shared_data: Path, tmp_path: Path) -> None:
    from rdkit import Chem

    protein, ligands = _files(shared_data, "hif2a")
    posed = read_molecules(ligands)[0]
    conformer = posed.GetConformer()
    moved = Chem.Mol(posed)
    moved.GetConformer().SetPositions(np.array(conformer.GetPositions())[:, [1, 2, 0]] + 1.0)
    pocket = pocket_of(protein, centre(22.0, 0.0, -9.0), PocketOptions())
    first, second = (in_pocket(ligand_from_molecule("l", molecule, {}), pocket) for molecule in (posed, moved))
    assert first.system_id == second.system_id


def test_ligands_of_a_file_share_one_pocket_that_a_held_out_one_need_not_define(shared_data: Path) -> None:
    protein, ligands = _files(shared_data, "cmet")
    names = molecule_names(read_molecules(ligands))
    union = pocket_systems(protein, ligands)
    pockets = [system.select(np.flatnonzero(system.roles == SiteRole.POCKET)) for system, _ in union]
    assert all(np.array_equal(pocket.reference_positions, pockets[0].reference_positions) for pocket in pockets)
    held_out = names[0]
    options = PocketOptions(defined_by=tuple(names[1:]))
    _, frames = pocket_system(protein, ligands, held_out, options)
    alone = pocket_of(protein, place_of_ligands(ligands, names[1:]), options)
    assert np.array_equal(frames.positions[0][-alone.system.n_sites :], alone.system.reference_positions)
    with pytest.raises(UserError, match=r"ligands\.sdf: no ligand 'nobody'"):
        pocket_systems(protein, ligands, PocketOptions(defined_by=("nobody",)))


def test_a_shell_keeps_near_atoms_alone_and_motion_is_chosen(shared_data: Path) -> None:
    protein, ligands = _files(shared_data, "hif2a")
    place = place_of_ligands(ligands)
    whole = pocket_of(protein, place, PocketOptions()).system
    shell = pocket_of(protein, place, PocketOptions(shell=6.0, motion=PocketMotion.MOBILE)).system
    assert place.distances(shell.reference_positions).max() <= 6.0 < place.distances(whole.reference_positions).max()
    assert shell.n_sites < whole.n_sites / 2
    assert shell.mobile.all() and not whole.mobile.any()
    with pytest.raises(UserError, match="shell"):
        PocketOptions(shell=12.0)


def test_pocket_keeps_charges_breaks_and_the_numbers_of_its_file(shared_data: Path) -> None:
    protein, ligands = _files(shared_data, "thrombin")
    pocket = pocket_of(protein, place_of_ligands(ligands), PocketOptions())
    labels = pocket.description["pocket_residues"]
    assert json.loads(json.dumps(pocket.description)) == pocket.description
    system = pocket.system
    by_label = {
        labels[str(int(system.residue_index[i]) + 1)] + ":" + system.atom_names[i]: i for i in range(system.n_sites)
    }
    aspartate = [system.formal_charges[by_label[f"H:ASP189:{name}"]] for name in ("OD1", "OD2")]
    assert sorted(aspartate) == [-1, 0]
    sulphurs = [tuple(bond) for bond in system.bonds if (system.elements[bond] == 16).all()]
    assert len(sulphurs) >= 1
    assert set(pocket.description["dropped"]) == {"HOH"}
    steps = np.diff(np.unique(system.residue_index))
    assert (steps > 1).any()


def test_smiles_takes_the_place_of_a_box_or_a_centre(shared_data: Path) -> None:
    protein, ligands = _files(shared_data, "hif2a")
    middle = place_of_ligands(ligands).positions.mean(axis=0)
    boxed = pocket_system_from_smiles("x", protein, "OCc1ccccc1", PocketOptions(place=Box(middle - 3, middle + 3)))
    centred = pocket_system_from_smiles("x", protein, "OCc1ccccc1", PocketOptions(place=centre(*middle)))
    assert centred.n_sites < boxed.n_sites
    assert (boxed.roles == SiteRole.LIGAND).sum() == 8
    with pytest.raises(UserError, match="SMILES has no pose"):
        pocket_system_from_smiles("x", protein, "CCO", PocketOptions())
    with pytest.raises(UserError, match=r"protein\.pdb: the protein has no atom within 10 Å"):
        pocket_system_from_smiles("x", protein, "CCO", PocketOptions(place=centre(500.0, 0.0, 0.0)))
    with pytest.raises(UserError, match="corners"):
        Box(middle, middle - 1)


def test_ligand_inside_a_structure_agrees_with_its_own_file(shared_data: Path) -> None:
    structure = shared_data / "complexes" / "diffdock" / "6w70.pdb"
    system, frames = pocket_system_from_complex(structure, LigandResidue("GG2"), GG2)
    _check(system, frames)
    assert set(system.residue_names[:34]) == {"GG2"} and set(system.origin["dropped"]) == {"ACT", "GG2", "HOH", "SO4"}
    [(apart, own)] = pocket_systems(structure, structure.with_name("6w70_ligand.sdf"))
    nearest = np.linalg.norm(frames.positions[0][:34, None] - own.positions[0][None, :34], axis=-1).min(axis=1)
    assert nearest.max() < 0.01
    assert sorted(system.bond_orders.tolist()) == sorted(apart.bond_orders.tolist())
    assert sorted(system.elements.tolist()) == sorted(apart.elements.tolist())


def test_wrong_residue_or_smiles_of_a_complex_is_refused(shared_data: Path) -> None:
    structure = shared_data / "complexes" / "diffdock" / "6w70.pdb"
    with pytest.raises(UserError, match=r"no residue XYZ; .*ACT, GG2, SO4"):
        pocket_system_from_complex(structure, LigandResidue("XYZ"))
    with pytest.raises(UserError, match="2 residues are ACT: A302, A304"):
        pocket_system_from_complex(structure, LigandResidue("ACT"))
    with pytest.raises(UserError, match="GG2: 34 heavy atoms"):
        pocket_system_from_complex(structure, LigandResidue("GG2"), "CCO")


def test_bad_ligand_is_named_with_its_place_in_the_file(shared_data: Path) -> None:
    folder = shared_data / "complexes" / "diffdock"
    with pytest.raises(UserError, match=r"1cbr_ligand\.sdf, molecule 1 \(1cbr_ligand\): atom 15 .*valence"):
        pocket_systems(folder / "1cbr_protein.pdb", folder / "1cbr_ligand.sdf")


def test_ligand_of_another_protein_lies_outside_and_both_are_named(shared_data: Path) -> None:
    protein, own = _complex(shared_data, "1a0q")
    foreign = _complex(shared_data, "1a46")[1]
    with pytest.raises(UserError, match=r"'1a46_ligand' lies outside the pocket of 1a0q_protein_processed\.pdb"):
        pocket_systems(protein, foreign, PocketOptions(place=place_of_ligands(own)))


def test_copy_of_a_ligand_left_in_the_structure_is_refused(shared_data: Path) -> None:
    structure = shared_data / "complexes" / "diffdock" / "6w70.pdb"
    with pytest.raises(UserError, match=r"overlaps GG2.*copy of a ligand"):
        pocket_systems(structure, structure.with_name("6w70_ligand.sdf"), PocketOptions(cofactors=("GG2",)))
    with pytest.raises(UserError, match="no cofactor 'HEM'"):
        pocket_systems(structure, structure.with_name("6w70_ligand.sdf"), PocketOptions(cofactors=("HEM",)))


def test_ligand_without_hydrogens_or_coordinates(shared_data: Path, tmp_path: Path) -> None:
    from rdkit import Chem

    protein, ligands = _complex(shared_data, "1a0q")
    [(whole, frames)] = pocket_systems(protein, ligands)
    bare = tmp_path / "bare.sdf"
    bare.write_text(Chem.MolToMolBlock(Chem.RemoveHs(read_molecules(ligands)[0])) + "$$$$\n")
    [(stripped, again)] = pocket_systems(protein, bare)
    assert stripped.elements.tolist() == whole.elements.tolist()
    assert np.allclose(again.positions, frames.positions, atol=1e-3)
    flat = tmp_path / "flat.sdf"
    flat.write_text(Chem.MolToMolBlock(Chem.MolFromSmiles("OCc1ccccc1")) + "$$$$\n")
    with pytest.raises(UserError, match="no three-dimensional pose"):
        pocket_systems(protein, flat, PocketOptions(place=place_of_ligands(ligands)))


def test_mmcif_gives_the_same_pocket_as_pdb(shared_data: Path, tmp_path: Path) -> None:
    gemmi = pytest.importorskip("gemmi")
    protein, ligands = _complex(shared_data, "6moa")
    converted = tmp_path / "same.cif"
    gemmi.read_structure(str(protein)).make_mmcif_document().write_file(str(converted))
    place = place_of_ligands(ligands)
    first, second = (pocket_of(path, place, PocketOptions(name="p")).system for path in (protein, converted))
    assert first.system_id == second.system_id


def test_broken_structure_files_are_named(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "note.pdb").write_text("hello\n")
    (tmp_path / "note.cif").write_text("hello\n")
    for name in ("note.pdb", "note.cif", "absent.pdb"):
        with pytest.raises(UserError, match=name):
            pocket_of(tmp_path / name, centre(0.0, 0.0, 0.0), PocketOptions())


def test_mol2_files_hold_one_or_many_molecules(tmp_path: Path) -> None:
    one, two = tmp_path / "one.mol2", tmp_path / "two.mol2"
    one.write_text(METHANOL_MOL2.format(name="methanol"))
    two.write_text(METHANOL_MOL2.format(name="a") + METHANOL_MOL2.format(name="b"))
    assert system_from_sdf("methanol", one).elements.tolist() == [6, 8, 1, 1, 1, 1]
    assert [system.name for system in systems_from_file(two)] == ["a", "b"]
    with pytest.raises(UserError, match="2 molecules, expected 1"):
        system_from_sdf("two", two)
    two.write_text(METHANOL_MOL2.format(name="a") + "@<TRIPOS>MOLECULE\nbroken\n 1 0\n")
    with pytest.raises(UserError, match=r"two\.mol2, molecule 2: the record cannot be parsed"):
        read_molecules(two)


def test_mol2_without_its_hydrogens_is_refused(tmp_path: Path) -> None:
    lines = METHANOL_MOL2.format(name="bare").replace(" 6 5 0", " 2 1 0").splitlines()
    bare = tmp_path / "bare.mol2"
    bare.write_text("\n".join(lines[:9] + lines[13:15]) + "\n")
    with pytest.raises(UserError, match=r"bare\.mol2: MOL2 molecule 'bare': atom 1 \(C\) lacks hydrogens"):
        read_molecules(bare)


@pytest.mark.parametrize(
    "smiles",
    ["c1cc[nH]c1", "C[n+]1ccccc1", "O=C([O-])c1c[nH]c2ccccc12", "N[C@@H](C)C(=O)O", "FC(F)(F)c1ncccn1"],
)
def test_a_system_gives_back_the_molecule_it_came_from(smiles: str) -> None:
    from dataclasses import replace

    from rdkit import Chem

    from dig_scale.importers.molecule import ligand_from_smiles, system_from_smiles

    expected = Chem.CanonSmiles(smiles, useChiral=0)
    heavy = ligand_from_smiles("m", smiles).system
    for system in (heavy, replace(heavy, origin={})):
        assert Chem.CanonSmiles(Chem.MolToSmiles(rdkit_molecule(system)), useChiral=0) == expected
    whole = Chem.RemoveHs(rdkit_molecule(system_from_smiles("m", smiles)))
    assert Chem.CanonSmiles(Chem.MolToSmiles(whole), useChiral=0) == expected
