"""A file of the user becomes the System that a model of its sites samples; what cannot be is one line that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dig_scale.errors import UserError
from dig_scale.importers.backbone import read_backbone
from dig_scale.importers.sampled import Reading, is_file_name, system_from_file
from dig_scale.stages.sample import trained_system
from dig_scale.system import SiteRole, SystemKind
from tests.dig_scale.serving.test_serving_kinds import save
from tests.kinds import catalyst

CARBON = '{n}\nLattice="3.6 0 0 0 3.6 0 0 0 3.6" Properties=species:S:1:pos:R:3 pbc="T T T"\nC 0 0 0\nC 1.8 1.8 1.8\n'
SLAB = (
    '3\nLattice="5 0 0 0 5 0 0 0 20" Properties=species:S:1:pos:R:3:tags:I:1 pbc="T T F"\n'
    "Cu 0.0 0.0 0.0 0\nCu 1.8 1.8 1.8 1\nO 1.8 1.8 3.2 2\n"
)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_protein_file_is_a_chain_of_residues_for_a_model_of_residues(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "bioemu_tests" / "chignolin.pdb"
    checkpoint = save(tmp_path, "protein")
    system = trained_system(checkpoint, str(file))
    assert system.kind == SystemKind.PROTEIN and system.n_sites == 10
    assert system.system_id == read_backbone("chignolin", [file])[0].system_id
    with pytest.raises(UserError, match=r"poses\.sdf: the model's sites are residues; expected a protein in \.pdb"):
        trained_system(checkpoint, str(written(tmp_path, "poses.sdf", "")))


def test_a_crystal_file_is_its_composition_and_a_slab_file_its_first_structure(tmp_path: Path) -> None:
    crystal = written(tmp_path, "diamond.xyz", CARBON.format(n=2))
    found = trained_system(save(tmp_path / "one", "crystal"), str(crystal))
    assert found.name == "C2" and found.cell is None and found.kind == SystemKind.CRYSTAL
    surface = trained_system(save(tmp_path / "two", "catalyst"), str(written(tmp_path, "O-Cu.xyz", SLAB)))
    assert surface.name == "O-Cu" and surface.roles.tolist() == [
        SiteRole.SUBSURFACE,
        SiteRole.SURFACE,
        SiteRole.ADSORBATE,
    ]


def test_what_is_no_system_of_the_model_is_named(tmp_path: Path) -> None:
    two = CARBON.format(n=2) + CARBON.format(n=2).replace("\nC 0", "\nSi 0")
    crystals, anchored = Reading("crystal", ("crystal",)), Reading("anchored", ("molecule",))
    for name, text, reading, words in [
        ("two.xyz", two, crystals, r"two\.xyz: holds crystals of 2 compositions \(C2, CSi\)"),
        ("a.pdb", "END\n", crystals, r"a\.pdb: no known crystal format"),
        ("a.pdb", "END\n", anchored, r"a\.pdb: the model samples ligands in pockets.* System as \.json"),
        ("a.pdb", "END\n", Reading("anchored", ("catalyst",)), r"a\.pdb: the model samples slabs.* POSCAR"),
        ("a.json", "no", crystals, r"a\.json: not a system in JSON"),
    ]:
        with pytest.raises(UserError, match=words):
            system_from_file(written(tmp_path, name, text), reading)
    with pytest.raises(UserError, match=r"no file at .*absent\.cif"):
        trained_system(save(tmp_path, "crystal"), str(tmp_path / "absent.cif"))
    with pytest.raises(
        UserError, match=r"--system 'nosuch': no file, and no training system of that name; .* has crystal"
    ):
        trained_system(save(tmp_path, "crystal"), "nosuch")
    assert is_file_name("here.poscar") and not is_file_name("ACE-ALA-NME")


def test_a_system_in_json_is_taken_as_it_is(tmp_path: Path) -> None:
    system = catalyst().system
    file = written(tmp_path, "slab.json", system.to_json())
    assert trained_system(save(tmp_path, "catalyst"), str(file)).system_id == system.system_id
