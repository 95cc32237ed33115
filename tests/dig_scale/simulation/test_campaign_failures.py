"""What goes wrong in a campaign is said: at once where it can be known, else in campaign.json after the rest is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dig_shards.trajectory import TrajectoryReader

from dig_scale.config import Recipe, SystemSpec
from dig_scale.errors import UserError
from dig_scale.records import find_trajectories
from dig_scale.simulation.campaign import Progress, simulate
from dig_scale.simulation.engine import SimulationError
from tests.simulation_runs import actor_processes, ray_session, small_recipe

__all__ = ["ray_session"]


def _with_systems(recipe: Recipe, *systems: SystemSpec) -> Recipe:
    return recipe.model_copy(update={"systems": systems})


def test_recipe_without_simulation_or_with_a_path_as_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="simulate"):
        simulate(Recipe(name="empty"), tmp_path)
    with pytest.raises(UserError, match="names a folder"):
        simulate(_with_systems(small_recipe(), SystemSpec(name="../x", sequence="ACE-ALA-NME")), tmp_path)


def test_bad_system_is_reported_as_the_importer_says_it(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="residue 2 is 'FOO'"):
        simulate(_with_systems(small_recipe(), SystemSpec(name="odd", sequence="ACE-FOO-NME")), tmp_path)


def test_failed_replica_is_recorded_and_the_others_go_on(ray_session: None, tmp_path: Path) -> None:
    recipe = small_recipe()
    simulate(recipe, tmp_path / "good")
    out = tmp_path / "out"
    (out / "ala2").mkdir(parents=True)
    (out / "ala2" / "system.json").write_text((tmp_path / "good" / "ala2" / "system.json").read_text())
    # Replica 1 finds frames without the journal that would explain them.
    (tmp_path / "good" / "ala2" / "replica1.zarr").rename(out / "ala2" / "replica1.zarr")
    with pytest.raises(SimulationError, match=r"1 of 2 replicas failed.*ala2/replica1.*journal is gone"):
        simulate(recipe, out)
    rows = json.loads((out / "campaign.json").read_text())["replicas"]
    assert [row["status"] for row in rows] == ["finished", "failed"]
    assert "journal is gone" in rows[1]["error"]
    assert TrajectoryReader(out / "ala2" / "replica0.zarr").is_finished


def test_explosion_ends_the_campaign_with_its_reason(ray_session: None, tmp_path: Path) -> None:
    wild = small_recipe(time_step_fs=40.0, constraints="none", hydrogen_mass=1.0, replicas=1, equilibration_ps=40.0)
    with pytest.raises(SimulationError, match=r"broke down.*time_step_fs"):
        simulate(wild, tmp_path)


def test_replica_whose_process_keeps_dying_is_given_up(ray_session: None, tmp_path: Path) -> None:
    kills = 0

    def kill_everything(progress: Progress) -> None:
        nonlocal kills
        for process in actor_processes():
            process.kill()
            kills += 1

    endless = small_recipe(replicas=1, equilibration_ps=20_000.0)
    with pytest.raises(SimulationError, match="died 3 times without storing a chunk"):
        simulate(endless, tmp_path, kill_everything)
    assert kills >= 3
    assert all(TrajectoryReader(store).n_frames == 0 for store in find_trajectories(tmp_path))
