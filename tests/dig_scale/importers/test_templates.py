"""A known structure as pair features: its distances, whatever its place and hand; nothing where it has no residue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dig_scale.errors import UserError
from dig_scale.importers.backbone import read_backbone
from dig_scale.importers.representations import represented
from dig_scale.importers.templates import CENTRES, template_features


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


@pytest.mark.parametrize("residue", [0, 5])
def test_a_residue_that_the_template_lacks_has_none(chignolin: Path, tmp_path: Path, residue: int) -> None:
    system, _ = read_backbone("chignolin", [chignolin])
    found = template_features(system, without(chignolin, tmp_path / "gap.pdb", residue))
    assert [site for site in range(system.n_sites) if not found[site].any()] == [residue]
    assert np.array_equal(found[1, 9], template_features(system, chignolin)[1, 9])


def test_a_residue_that_is_another_there_has_none(chignolin: Path, tmp_path: Path) -> None:
    system, _ = read_backbone("chignolin", [chignolin])
    found = template_features(system, without(chignolin, tmp_path / "other.pdb", 5, "ALA"))
    assert [site for site in range(system.n_sites) if not found[site].any()] == [5]


def test_a_template_of_another_protein_is_refused(chignolin: Path, shared_data: Path) -> None:
    system, _ = read_backbone("adk", [shared_data / "adk_transition" / "adk_closed.pdb"])
    with pytest.raises(UserError, match=r"chignolin\.pdb: \d+ of the 214 residues of system 'adk' align"):
        template_features(system, chignolin)
