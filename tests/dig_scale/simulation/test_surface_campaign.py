"""Campaigns on surfaces: one store per walker, chunks that restart exactly, calculators that are tried before all else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dig_scale import records
from dig_scale.config import CalculatorSpec, Recipe, Simulate, SurfaceSpec, SystemSpec
from dig_scale.importers.catalyst import surface_system
from dig_scale.simulation.campaign import simulate
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.replica import ReplicaJob, ReplicaRun
from dig_scale.system import SystemKind
from tests.simulation_runs import ray_session

__all__ = ["ray_session"]


def _simulate(**changes: object) -> Simulate:
    settings: dict[str, object] = {
        "temperature": 600.0,
        "friction_per_ps": 5.0,
        "time_step_fs": 4.0,
        "frame_spacing_ps": 0.04,
        "equilibration_ps": 0.04,
        "frames": 5,
        "chunk_frames": 2,
        "replicas": 1,
        "walkers": 3,
    }
    return Simulate.model_validate(settings | changes)


def _job(out: Path, settings: Simulate) -> ReplicaJob:
    system = surface_system("cu-o", SurfaceSpec(metal="Cu"))
    return ReplicaJob(out, system, settings, recipe_seed=1, replica=0, platform="ASE")


def _finish(job: ReplicaJob, reopen_every: int) -> list[np.ndarray]:
    run, chunks = ReplicaRun(job), 0
    while not run.advance().is_complete:
        chunks += 1
        if chunks % reopen_every == 0:
            run.close()
            run = ReplicaRun(job)
    run.close()
    return [records.read_trajectory_frames(path)[1].positions for path in job.files.stores]


def test_walkers_have_stores_of_their_own_and_an_interrupted_run_takes_the_same_steps(tmp_path: Path) -> None:
    whole = _finish(_job(tmp_path / "whole", _simulate()), 99)
    interrupted = _finish(_job(tmp_path / "cut", _simulate()), 1)
    assert [array.shape for array in whole] == [(5, 17, 3)] * 3
    assert not np.allclose(whole[0], whole[1])
    assert all((one == two).all() for one, two in zip(whole, interrupted, strict=True))


def test_temperatures_of_a_ladder_on_a_slab_are_exchanged(tmp_path: Path) -> None:
    ladder = {"temperatures": (600.0, 620.0), "exchange_interval_ps": 0.02}
    job = _job(tmp_path, _simulate(walkers=1, replica_exchange=ladder))
    assert [array.shape for array in _finish(job, 99)] == [(5, 17, 3)] * 2
    assert [records.trajectory_origin(path)["temperature_K"] for path in job.files.stores] == [600.0, 620.0]


def test_campaign_on_a_surface_stores_slabs_and_what_they_cost(ray_session: None, tmp_path: Path) -> None:
    spec = SystemSpec(name="cu-o", surface=SurfaceSpec(metal="Cu"))
    report = simulate(Recipe(name="surfaces", systems=(spec,), simulate=_simulate()), tmp_path)
    assert len(report.trajectories) == 3 and report.simulated_ns == pytest.approx(3 * 5 * 0.04e-3)
    system, frames = records.read_trajectory_frames(report.trajectories[2])
    assert system.kind is SystemKind.CATALYST and frames.energy is not None and frames.forces is not None
    origin = records.trajectory_origin(report.trajectories[2])
    assert origin["method"] == "ASE EMT" and origin["slab_layers"] == "held" and origin["rung"] == 2
    assert records.simulation_cpu_seconds(report.trajectories) == pytest.approx(report.cpu_seconds)


def test_element_that_the_calculator_lacks_ends_the_campaign_before_it_starts(
    ray_session: None, tmp_path: Path
) -> None:
    spec = SystemSpec(name="ir-s", surface=SurfaceSpec(metal="Ir", adsorbate="S"))
    with pytest.raises(SimulationError, match=r"'ir-s'.*no parameters for Ir, S"):
        simulate(Recipe(name="surfaces", systems=(spec,), simulate=_simulate()), tmp_path)
    assert not list(tmp_path.rglob("*.zarr"))


def test_slab_is_simulated_by_tight_binding_too(tmp_path: Path) -> None:
    small = surface_system("cu-h", SurfaceSpec(metal="Cu", size=(1, 1, 2), fixed_layers=1, adsorbate="H", height=1.0))
    settings = _simulate(walkers=1, frames=1, chunk_frames=1, time_step_fs=2.0, equilibration_ps=0.0)
    job = replace(
        _job(tmp_path, settings.model_copy(update={"calculator": CalculatorSpec(name="tblite")})), system=small
    )
    assert _finish(job, 99)[0].shape == (1, 3, 3)
    assert records.trajectory_origin(job.files.stores[0])["method"] == "tblite GFN1-xTB"
