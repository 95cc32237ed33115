"""Frames computed again: the right frames, numbers of the named method, nothing lost or half-written by a killed worker."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from dig_shards.trajectory import TrajectoryReader, TrajectoryWriter

from dig_scale import records
from dig_scale.config import CalculatorSpec, SurfaceSpec
from dig_scale.errors import UserError
from dig_scale.importers.catalyst import surface_system
from dig_scale.simulation.ase_engine import CalculatorPotential
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.relabel import ChosenFrames, RelabelOptions, every, relabel
from tests.simulation_runs import ray_session

__all__ = ["ray_session"]

SPEC = CalculatorSpec(name="tblite")


def _store(path: Path, frames: int, squeeze: float = 1.0) -> Path:
    """A small slab with hydrogen that climbs; energies are wrong on purpose."""
    spec = SurfaceSpec(metal="Cu", size=(1, 1, 2), fixed_layers=1, adsorbate="H", height=1.0)
    system = surface_system("cu-h", spec)
    positions = np.repeat(system.reference_positions[None], frames, axis=0)
    positions[:, -1, 2] += 0.01 * np.arange(frames)
    positions[-1] *= squeeze
    origin = {"method": "ASE EMT", "temperature_K": 600.0, "first_frame_ps": 0.5, "frame_spacing_ps": 0.5}
    names = (records.POSITIONS, records.ENERGY, records.FORCES)
    attributes = records.trajectory_attributes(system, origin)
    arrays = {"positions": positions, "energy": np.zeros(frames), "forces": np.zeros_like(positions)}
    with TrajectoryWriter.create(path, records.field_specs(system.n_sites, names), attributes, frames) as writer:
        writer.finish(arrays)
    return path


def test_chosen_frames_get_the_numbers_of_the_method_that_the_origin_names(ray_session: None, tmp_path: Path) -> None:
    store = _store(tmp_path / "run.zarr", 8)
    (out,) = relabel([ChosenFrames(store, (1, 4, 7))], SPEC, tmp_path / "out", RelabelOptions(chunk_frames=2))
    assert out == tmp_path / "out" / "cu-h" / "run.zarr" and TrajectoryReader(out).is_finished
    system, old = records.read_trajectory_frames(store)
    _, new = records.read_trajectory_frames(out)
    assert (new.positions == old.positions[[1, 4, 7]]).all()
    expected = CalculatorPotential(system, SPEC).energy_and_forces(new.positions.astype(float))
    assert new.energy is not None and new.forces is not None
    np.testing.assert_allclose(new.energy, expected[0], atol=1e-6)
    np.testing.assert_allclose(new.forces, expected[1], atol=1e-4)
    origin = records.trajectory_origin(out)
    assert origin["energy"]["method"] == origin["forces"]["method"] == "tblite GFN1-xTB"
    assert origin["positions"]["frames"] == [1, 4, 7] and origin["positions"]["origin"]["method"] == "ASE EMT"
    assert origin["temperature_K"] == 600.0 and new.time_ps.tolist() == [1.0, 2.5, 4.0]


def test_second_call_computes_nothing_and_another_method_is_refused(ray_session: None, tmp_path: Path) -> None:
    store = _store(tmp_path / "run.zarr", 4)
    (out,) = relabel([every(store, 2)], SPEC, tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in sorted(out.rglob("*")) if file.is_file()}
    assert relabel([every(store, 2)], SPEC, tmp_path / "out") == [out]
    assert before == {file: file.stat().st_mtime_ns for file in sorted(out.rglob("*")) if file.is_file()}
    with pytest.raises(SimulationError, match="another method"):
        relabel([every(store, 2)], CalculatorSpec(), tmp_path / "out")


def test_frame_that_fails_is_named_and_other_stores_are_written(ray_session: None, tmp_path: Path) -> None:
    good, bad = _store(tmp_path / "good.zarr", 3), _store(tmp_path / "bad.zarr", 3, squeeze=0.0)
    with pytest.raises(SimulationError, match=r"1 of 2 stores failed.*bad\.zarr.*frame 2"):
        relabel([every(good, 1), every(bad, 1)], SPEC, tmp_path / "out", RelabelOptions(chunk_frames=2))
    assert TrajectoryReader(tmp_path / "out" / "cu-h" / "good.zarr").n_frames == 3
    half = TrajectoryReader(tmp_path / "out" / "cu-h" / "bad.zarr")
    assert half.n_frames == 2 and not half.is_finished


@pytest.mark.parametrize("frames", [(), (3, 1), (2, 9), (-1, 2), (1, 1)])
def test_frames_that_the_store_does_not_hold_in_order_are_refused(tmp_path: Path, frames: tuple[int, ...]) -> None:
    store = _store(tmp_path / "run.zarr", 4)
    with pytest.raises(UserError, match=r"run\.zarr: expected ascending frames from 0 to 3"):
        relabel([ChosenFrames(store, frames)], SPEC, tmp_path / "out")


def _workers() -> list[psutil.Process]:
    """Ray workers of this process that compute at the moment."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::_run" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _kill_one_when(store: Path, frames: int, killed: list[int]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        workers = _workers() if store.is_dir() and TrajectoryReader(store).n_frames >= frames else []
        if workers:
            killed.append(workers[0].pid)
            workers[0].kill()
            return
        time.sleep(0.005)


def test_killed_worker_is_tried_again_and_goes_on_from_its_last_chunk(ray_session: None, tmp_path: Path) -> None:
    store = _store(tmp_path / "run.zarr", 60)
    target = tmp_path / "out" / "cu-h" / "run.zarr"
    killed: list[int] = []
    killer = threading.Thread(target=_kill_one_when, args=(target, 4, killed))
    killer.start()
    (out,) = relabel([every(store, 1)], SPEC, tmp_path / "out", RelabelOptions(chunk_frames=4))
    killer.join()
    assert killed
    _, new = records.read_trajectory_frames(out)
    assert TrajectoryReader(out).is_finished and new.n_frames == 60
    assert (new.positions == records.read_trajectory_frames(store)[1].positions).all()
    TrajectoryReader(out).verify()
