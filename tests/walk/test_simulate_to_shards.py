"""Steps 2 to 4 of the walk: recipe -> trajectories -> packed dataset, with every frame where it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dig_shards.reader import ShardReader
from dig_shards.verify import verify

from dig_scale.config import Pack, Recipe
from dig_scale.errors import UserError
from dig_scale.records import (
    dataset_systems,
    find_trajectories,
    pack_dataset,
    read_trajectory_frames,
    simulation_cpu_seconds,
    trajectory_origin,
)
from dig_scale.simulation.campaign import simulate
from dig_scale.simulation.engine import PhaseSpace
from dig_scale.simulation.openmm_engine import OpenMMEngine
from tests.simulation_runs import ray_session, small_ladder

__all__ = ["ray_session"]

_FRAMES = 23


def _recipe(**pack: object) -> Recipe:
    ladder = small_ladder()
    assert ladder.simulate is not None
    longer = ladder.simulate.model_copy(update={"frames": _FRAMES, "chunk_frames": 10})
    settings = {"validation_fraction": 0.2, "frames_per_member": 8} | pack
    return ladder.model_copy(update={"simulate": longer, "pack": Pack.model_validate(settings)})


@pytest.fixture(scope="module")
def trajectories(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trajectories")
    simulate(_recipe(), out)
    return out


def test_stores_hold_all_frames_of_every_temperature(trajectories: Path) -> None:
    stores = find_trajectories(trajectories)
    assert [store.name for store in stores] == [
        f"replica{k}-T{kelvin}.zarr" for k in (0, 1) for kelvin in (300, 360, 430)
    ]
    for store in stores:
        system, frames = read_trajectory_frames(store)
        assert frames.n_frames == _FRAMES
        np.testing.assert_allclose(frames.time_ps, 0.2 * np.arange(1, _FRAMES + 1))
        assert f"-T{trajectory_origin(store)['temperature_K']:g}." in store.name
        assert system.n_sites == 22
    assert (simulation_cpu_seconds(stores) or 0) > 0


def test_stored_energies_and_forces_belong_to_the_stored_positions(trajectories: Path) -> None:
    recipe = _recipe()
    assert recipe.simulate is not None
    system, frames = read_trajectory_frames(find_trajectories(trajectories)[0])
    assert frames.energy is not None
    assert frames.forces is not None
    frozen = recipe.simulate.model_copy(update={"time_step_fs": 1e-9, "constraints": "none"})
    engine = OpenMMEngine(system, frozen, 300.0, "Reference")
    for k in (0, _FRAMES - 1):
        engine.restore(PhaseSpace(frames.positions[k].astype(float), np.zeros((22, 3)), 0), 1)
        again = engine.advance(1)
        # Constrained bonds carry no energy in the run; here their terms are zero to within the storage grid of 1e-4 Å.
        assert again.energy is not None
        assert again.energy[0] == pytest.approx(frames.energy[k], abs=2e-3)
        mobile = system.elements != 1
        bonded_to_hydrogen = np.unique(system.bonds[~mobile[system.bonds].all(axis=1)])
        free = np.setdiff1d(np.arange(22), bonded_to_hydrogen)
        assert again.forces is not None
        np.testing.assert_allclose(again.forces[0][free], frames.forces[k][free], atol=2e-2)


def test_dataset_holds_each_target_frame_once(trajectories: Path, tmp_path: Path) -> None:
    pack_dataset(_recipe(), [trajectories], tmp_path / "set")
    verify(tmp_path / "set").raise_if_damaged()
    (system,) = dataset_systems(tmp_path / "set")
    assert system.n_sites == 22
    wanted = [p for p in find_trajectories(trajectories) if "-T300" in p.name]
    expected = np.concatenate([read_trajectory_frames(path)[1].positions for path in wanted])
    parts = [ShardReader(tmp_path / "set", split) for split in ("train", "validation")]
    packed = np.concatenate([one.read_batch(np.arange(one.n_frames), "positions") for one in parts])
    assert len(packed) == 2 * _FRAMES
    order = lambda x: np.lexsort(x.reshape(len(x), -1).T)  # noqa: E731
    np.testing.assert_array_equal(packed[order(packed)], expected[order(expected)])


def test_heavy_atoms_alone_are_packed_with_their_own_system(trajectories: Path, tmp_path: Path) -> None:
    pack_dataset(_recipe(atoms="heavy"), [trajectories], tmp_path / "set")
    (system,) = dataset_systems(tmp_path / "set")
    assert system.n_sites == 10
    assert 1 not in system.elements
    assert len(system.stereocentres) == 1
    reader = ShardReader(tmp_path / "set", "train")
    record = reader.record(3)
    assert record.system_id == system.system_id
    store = trajectories / f"{record.source.trajectory}.zarr"
    whole, frames = read_trajectory_frames(store)
    np.testing.assert_array_equal(
        record.arrays["positions"], frames.positions[record.source.frame][whole.heavy_sites()]
    )


def test_stride_thins_every_trajectory(trajectories: Path, tmp_path: Path) -> None:
    pack_dataset(_recipe(stride=5), [trajectories], tmp_path / "set")
    counts = [ShardReader(tmp_path / "set", split).n_frames for split in ("train", "validation")]
    assert sum(counts) == 2 * 5


def test_temperature_that_is_not_there_is_named(trajectories: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trajectory at 310 K: found 300, 360, 430 K"):
        pack_dataset(_recipe(temperature=310.0), [trajectories], tmp_path / "set")


def test_empty_folder_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dig-scale simulate"):
        pack_dataset(_recipe(), [tmp_path], tmp_path / "set")
    with pytest.raises(UserError, match="dig-scale pack"):
        dataset_systems(tmp_path)
