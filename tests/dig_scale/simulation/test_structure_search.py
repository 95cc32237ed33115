"""Random structure search on metals of effective medium theory: minima, no repeats, and nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT

from dig_scale import records
from dig_scale.errors import UserError
from dig_scale.geometry import lattice
from dig_scale.simulation.ase_relaxation import Relaxation, relax_crystal
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.structure_search import Search, random_crystal, search_structures

COPPER = (29, 29)
SEARCH = Search(
    candidates=5,
    smallest_volume=10,
    largest_volume=15,
    shortest_distance=1.9,
    relaxation=Relaxation(0.05, 300),
    chunk_frames=1,
)


def shortest(positions: np.ndarray, cell: np.ndarray) -> float:
    rows = torch.from_numpy(cell)[None]
    places = lattice.fractional(torch.from_numpy(positions)[None], rows)
    return float(
        lattice.periodic_edges(places, rows, torch.ones(places.shape[:2], dtype=torch.bool), 5.0).distances.min()
    )


def assert_same_stores(first: Path, second: Path) -> None:
    (_, ours), (_, theirs) = records.read_trajectory_frames(first), records.read_trajectory_frames(second)
    np.testing.assert_array_equal(ours.positions, theirs.positions)
    np.testing.assert_array_equal(ours.cell, theirs.cell)
    np.testing.assert_array_equal(ours.energy, theirs.energy)
    np.testing.assert_array_equal(ours.labels["candidate"], theirs.labels["candidate"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    search_structures(COPPER, EMT, "ASE EMT", out, SEARCH)
    return out


def test_random_cells_keep_their_limits_and_their_seed() -> None:
    search = Search(1, 8.0, 12.0, 1.8, seed=4)
    elements = np.full(5, 13)
    for k in range(20):
        crystal = random_crystal(elements, search, k)
        volume = np.linalg.det(crystal.cell) / 5
        assert 8 <= volume <= 12
        assert shortest(crystal.positions, crystal.cell) >= 1.8
        np.testing.assert_array_equal(crystal.positions, random_crystal(elements, search, k).positions)
    assert not np.array_equal(random_crystal(elements, search, 0).cell, random_crystal(elements, search, 1).cell)


def test_limits_that_nothing_fits_are_an_error() -> None:
    with pytest.raises(UserError, match="allow more volume or shorter distances"):
        random_crystal(np.full(4, 29), Search(1, 3.0, 4.0, 4.0), 0)


def test_a_strained_crystal_relaxes_to_the_known_minimum_and_pressure_compresses_it() -> None:
    atoms = bulk("Cu")
    atoms.set_cell(atoms.cell.array * [[1.03], [0.98], [1.01]], scale_atoms=True)
    settings = Relaxation(0.01, 300)
    free = relax_crystal(atoms.numbers, atoms.positions, atoms.cell.array, EMT(), settings)
    np.testing.assert_allclose(np.linalg.norm(free.cell, axis=1), 3.59 / np.sqrt(2), atol=0.01)
    pressed = relax_crystal(atoms.numbers, atoms.positions, atoms.cell.array, EMT(), replace(settings, pressure=0.1))
    assert np.linalg.det(pressed.cell) < 0.95 * np.linalg.det(free.cell) and pressed.energy > free.energy
    with pytest.raises(SimulationError, match="after 2 steps"):
        relax_crystal(atoms.numbers, atoms.positions, atoms.cell.array, EMT(), Relaxation(1e-6, 2))


def test_stored_structures_are_distinct_minima_with_their_energies(finished: Path) -> None:
    system, frames = records.read_trajectory_frames(finished / "Cu2" / "Cu2.zarr")
    report = search_structures(COPPER, EMT, "ASE EMT", finished, SEARCH)
    assert report.kept == frames.n_frames >= 1 and report.kept + report.repeats + len(report.failed) == 5
    assert report.repeats > 0
    for positions, cell, energy in zip(frames.positions, frames.cell, frames.energy, strict=True):
        atoms = Atoms(system.elements, positions, cell=cell, pbc=True)
        atoms.calc = EMT()
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-3)
        assert np.abs(atoms.get_forces()).max() < 0.051
        np.testing.assert_allclose(cell, cell.T, atol=1e-9)
    lowest = bulk("Cu", a=3.59)
    lowest.calc = EMT()
    assert frames.energy.min() / 2 == pytest.approx(lowest.get_potential_energy(), abs=0.01)
    np.testing.assert_allclose(frames.labels["energy_per_atom"], frames.energy / 2)


def test_failed_candidates_are_recorded_and_passed_over(tmp_path: Path) -> None:
    search = replace(SEARCH, candidates=3, relaxation=Relaxation(1e-7, 1))
    report = search_structures(COPPER, EMT, "ASE EMT", tmp_path, search)
    assert report.kept == 0 and len(report.failed) == 3 and "candidate 0: forces were not below" in report.failed[0]


def test_a_search_killed_at_any_time_ends_as_if_it_had_not_been(finished: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ase.calculators.emt import EMT\n"
        "from dig_scale.importers.crystal_duplicates import Similarity\n"
        "from dig_scale.simulation.ase_relaxation import Relaxation\n"
        "from dig_scale.simulation.structure_search import Search, search_structures\n"
        f"search_structures({COPPER}, EMT, 'ASE EMT', Path(sys.argv[1]), {SEARCH!r})"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    store = tmp_path / "Cu2" / "Cu2.zarr"
    try:
        limit = time.monotonic() + 120
        while time.monotonic() < limit and running.poll() is None and not any(store.glob("energy/c*")):
            time.sleep(0.01)
        assert any(store.glob("energy/c*"))
    finally:
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    held = records.read_trajectory_frames(store)[1]
    assert np.isfinite(held.positions).all()
    resumed = search_structures(COPPER, EMT, "ASE EMT", tmp_path, SEARCH)
    whole = search_structures(COPPER, EMT, "ASE EMT", finished, SEARCH)
    assert_same_stores(resumed.store, whole.store)
    assert (resumed.kept, resumed.repeats, resumed.failed) == (whole.kept, whole.repeats, whole.failed)


def test_workers_find_what_one_process_finds(finished: Path, tmp_path: Path) -> None:
    report = search_structures(COPPER, EMT, "ASE EMT", tmp_path, replace(SEARCH, workers=2))
    assert_same_stores(report.store, finished / "Cu2" / "Cu2.zarr")


def test_a_folder_of_another_search_is_refused(finished: Path) -> None:
    with pytest.raises(UserError, match="holds another search"):
        search_structures(COPPER, EMT, "ASE EMT", finished, replace(SEARCH, seed=9))
    with pytest.raises(UserError, match="holds another search"):
        search_structures(COPPER, EMT, "some other method", finished, SEARCH)


@pytest.mark.parametrize(
    ("elements", "change", "message"),
    [
        ((), {}, "at least one atom"),
        (COPPER, {"candidates": 0}, "1 or more"),
        (COPPER, {"smallest_volume": 20.0}, "smallest <= largest"),
    ],
)
def test_senseless_settings_are_refused(
    elements: tuple[int, ...], change: dict[str, float], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        search_structures(elements, EMT, "ASE EMT", tmp_path, replace(SEARCH, **change))
