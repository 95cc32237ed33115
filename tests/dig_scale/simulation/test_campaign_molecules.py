"""Small molecules, solvated and prepared systems go through a campaign as peptides do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dig_scale.config import Recipe, SystemSpec
from dig_scale.records import read_trajectory_frames
from dig_scale.simulation.campaign import simulate
from dig_scale.simulation.openmm_systems import Model
from tests.simulation_runs import ray_session, small_recipe

__all__ = ["ray_session"]


def test_molecule_from_a_smiles_is_simulated_by_two_actors(ray_session: None, tmp_path: Path) -> None:
    recipe = small_recipe(time_step_fs=2.0)
    molecule = Recipe.model_validate(recipe.model_dump() | {"systems": (SystemSpec(name="ethanol", smiles="CCO"),)})
    report = simulate(molecule, tmp_path)
    assert [row.status for row in report.replicas] == ["finished", "finished"]
    systems, frames = zip(*(read_trajectory_frames(store) for store in report.trajectories), strict=True)
    assert [one.n_frames for one in frames] == [7, 7]
    assert not np.allclose(frames[0].positions, frames[1].positions, atol=0.1)
    assert systems[0].system_id == systems[1].system_id
    assert len(Model.load(tmp_path / "ethanol").positions) == 9
    origin = json.loads((tmp_path / "campaign.json").read_text())
    assert origin["simulated_ns"] > 0
