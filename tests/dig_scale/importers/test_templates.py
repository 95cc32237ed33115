"""A known structure as features: its distances and places, however it lies in its file; nothing where it has no residue."""

from __future__ import annotations

from pathlib import Path

import gemmi
import numpy as np
import pytest

from dig_scale.errors import UserError
from dig_scale.importers.backbone import read_backbone
from dig_scale.importers.representations import represented
from dig_scale.importers.templates import CENTRES, template_features
from dig_scale.template_layout import TEMPLATE_FEATURES


def without(source: Path, target: Path, residue: int, name: str | None = None) -> Path:
    """The file without a residue, or with another name for it."""
    lines = []
    for line in source.read_text().splitlines(keepends=True):
        here = line.startswith("ATOM") and int(line[22:26]) == residue
        if here and name is not None:
            lines.append(line[:17] + name + line[20:])
        elif not here:
            lines.append(line)
    target.write_text("".join(lines))
    return target


@pytest.fixture
def chignolin(shared_data: Path) -> Path:
    return shared_data / "bioemu_tests" / "chignolin.pdb"


def test_features_are_gaussians_of_the_distances(chignolin: Path) -> None:
    system, frames = read_backbone("chignolin", [chignolin])
    found = represented(system, f"template:{chignolin}").pair_features
    assert found is not None and found.shape == (system.n_sites, system.n_sites, len(CENTRES))
    distance = np.linalg.norm(frames.positions[0][2] - frames.positions[0][7])
    assert CENTRES[found[2, 7].argmax()] == pytest.approx(distance, abs=1.0)
    assert np.array_equal(found, found.swapaxes(0, 1))


def test_features_do_not_depend_on_how_the_structure_lies(chignolin: Path, tmp_path: Path) -> None:
    system, _ = read_backbone("chignolin", [chignolin])
    structure = gemmi.read_structure(str(chignolin))
    turn = gemmi.Transform(gemmi.Mat33([[0, -1, 0], [0.6, 0, -0.8], [0.8, 0, 0.6]]), gemmi.Vec3(5, -20, 3))
    for model in structure:
        model.transform_pos_and_adp(turn)
    structure.write_pdb(str(tmp_path / "turned.pdb"))
    one, two = template_features(system, chignolin), template_features(system, tmp_path / "turned.pdb")
    assert one.site.shape == (system.n_sites, TEMPLATE_FEATURES)
    assert np.abs(one.site - two.site).max() < 0.01
    assert np.abs(one.pair - two.pair).max() < 0.01


def test_residues_that_lie_elsewhere_have_other_features(chignolin: Path) -> None:
    system, _ = read_backbone("chignolin", [chignolin])
    site = template_features(system, chignolin).site
    apart = np.abs(site[:, None] - site[None]).max(-1)
    assert apart[~np.eye(system.n_sites, dtype=bool)].min() > 0.1


@pytest.mark.parametrize("residue", [0, 5])
def test_a_residue_that_the_template_lacks_has_none(chignolin: Path, tmp_path: Path, residue: int) -> None:
    system, _ = read_backbone("chignolin", [chignolin])
    found = template_features(system, without(chignolin, tmp_path / "gap.pdb", residue))
    for one in (found.site, found.pair):
        assert [site for site in range(system.n_sites) if not one[site].any()] == [residue]
    assert np.array_equal(found.pair[1, 9], template_features(system, chignolin).pair[1, 9])


def test_a_residue_that_is_another_there_has_none(chignolin: Path, tmp_path: Path) -> None:
    system, _ = read_backbone("chignolin", [chignolin])
    found = template_features(system, without(chignolin, tmp_path / "other.pdb", 5, "ALA"))
    assert [site for site in range(system.n_sites) if not found.pair[site].any()] == [5]


def test_a_template_of_another_protein_is_refused(chignolin: Path, shared_data: Path) -> None:
    system, _ = read_backbone("adk", [shared_data / "adk_transition" / "adk_closed.pdb"])
    with pytest.raises(UserError, match=r"chignolin\.pdb: \d+ of the 214 residues of system 'adk' align"):
        template_features(system, chignolin)
