"""Step 13 of the walk: an ensemble file against stored trajectories, by the stage that the command line runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dig_scale.config import Evaluate
from dig_scale.ensemble import Ensemble, write_ensemble_file
from dig_scale.errors import UserError
from dig_scale.evaluation.reference_files import reference_frames
from dig_scale.importers.trajectory import ImportOptions, LengthUnit, Sites, import_trajectory
from dig_scale.records import read_trajectory_frames
from dig_scale.stages.evaluate import evaluate_stage

QUICK = Evaluate(bins=36, bootstrap=20)


@pytest.fixture(scope="module")
def stored(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five-bead trajectory as a user imports it."""
    folder = shared_data / "ala2_cg"
    options = ImportOptions(
        temperature=300.0, sites=Sites.BEADS, length_unit=LengthUnit.ANGSTROM, frame_spacing_ps=10.0
    )
    out = tmp_path_factory.mktemp("imported")
    import_trajectory(folder / "ala2_cg.pdb", [folder / "ala2_coordinates.npy"], out, options)
    return out


def written(stored: Path, out: Path, mirror: tuple[int, int, int]) -> Path:
    """Every second frame as an ensemble, mirrored or not."""
    system, frames = read_trajectory_frames(next(stored.rglob("*.zarr")))
    positions = (frames.positions[::2] * np.array(mirror)).astype(np.float32)
    ensemble = Ensemble(system, positions, np.arange(len(positions)), seed=1)
    write_ensemble_file(ensemble, out / "ensemble.npz")
    return out


def test_the_data_itself_is_as_good_as_its_noise_floor(stored: Path, tmp_path: Path) -> None:
    page = evaluate_stage(written(stored, tmp_path / "e", (1, 1, 1)), stored, QUICK, tmp_path / "report")
    report = json.loads(page.with_name("report.json").read_text())
    distance = report["maps"][0]["divergence"]
    assert distance["model"] < 1.5 * distance["subsample"]
    assert (tmp_path / "report" / "summary.png").stat().st_size > 10_000
    assert report["subject"]["samples"] == 5000


def test_the_mirror_image_is_found_out(stored: Path, tmp_path: Path) -> None:
    page = evaluate_stage(written(stored, tmp_path / "e", (1, 1, -1)), stored, QUICK, tmp_path / "report")
    distance = json.loads(page.with_name("report.json").read_text())["maps"][0]["divergence"]
    assert distance["model"] > 0.3


def test_a_trajectory_file_needs_its_topology(stored: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.xtc"
    file.touch()
    with pytest.raises(UserError, match="--topology"):
        reference_frames(file, None, None)
