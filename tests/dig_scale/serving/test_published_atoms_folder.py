"""Slabs and carbon by published networks, from imported weights to the files of an ensemble."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dig_scale.ensemble import read_ensemble
from dig_scale.errors import UserError
from dig_scale.model.published.folder import import_published
from dig_scale.sampling.released_atoms import sigmoid_betas
from dig_scale.serving.published_atoms import AtomDraws, sample_published_atoms
from tests.dig_scale.model.published.published_files import (
    SMALL,
    carbon_table,
    catalyst_table,
    ligand_table,
    random_state,
    save,
)
from tests.dig_scale.model.published.test_published_atoms import slab

BETAS = sigmoid_betas(10, 0.3)


def imported(folder: Path, table: dict[str, tuple[int, ...]]) -> Path:
    import_published(save({"model": random_state(table)}, folder / "weights.pt"), None, folder / "published")
    return folder / "published"


def test_carbon_is_drawn_by_its_number_of_atoms(tmp_path: Path) -> None:
    folder = imported(tmp_path, carbon_table(**SMALL))
    draws = AtomDraws(folder, "C3", tmp_path / "out", num=2, betas=BETAS)
    ensemble = sample_published_atoms(draws)
    there = read_ensemble(tmp_path / "out")
    assert there.system.name == "C3" and there.cell is not None and there.cell.shape == (2, 3, 3)
    np.testing.assert_allclose(there.positions, ensemble.positions)
    with pytest.raises(UserError, match="holds another run"):
        sample_published_atoms(AtomDraws(folder, "C4", tmp_path / "out", num=2, betas=BETAS))
    for wrong in ("Si2", "C0", "absent.cif"):
        with pytest.raises(UserError, match="as in C8"):
            sample_published_atoms(AtomDraws(folder, wrong, tmp_path / "other", betas=BETAS))


def test_a_slab_is_drawn_from_its_file(tmp_path: Path) -> None:
    folder = imported(tmp_path, catalyst_table(**SMALL))
    file = tmp_path / "slab.json"
    file.write_text(slab().to_json())
    ensemble = sample_published_atoms(AtomDraws(folder, str(file), tmp_path / "out", num=2, betas=BETAS))
    assert ensemble.n_samples == 2 and ensemble.system.system_id == slab().system_id


def test_the_ligand_network_says_what_is_possible(tmp_path: Path) -> None:
    folder = imported(tmp_path, ligand_table(**SMALL))
    with pytest.raises(UserError, match=r"dig-ligand, of ligands, which has no door for files"):
        sample_published_atoms(AtomDraws(folder, "C3", tmp_path / "out"))
