"""Crystals measured against textbook numbers, and matched with known ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell

from dig_scale.errors import UserError
from dig_scale.evaluation import crystals
from dig_scale.importers.crystal import crystal_system
from dig_scale.importers.crystal_duplicates import Similarity
from dig_scale.system import Frames, System


def from_atoms(*structures: Atoms) -> tuple[System, Frames]:
    cells = np.stack([atoms.cell.array for atoms in structures])
    positions = np.stack([atoms.positions for atoms in structures])
    return crystal_system(structures[0].numbers), Frames(positions, np.arange(len(structures), dtype=float), cell=cells)


def diamond() -> Atoms:
    return bulk("C", "diamond", 3.567, cubic=True)


def graphite() -> Atoms:
    a, c = 2.461, 6.708
    cell = [[a, 0, 0], [-a / 2, a * math.sqrt(3) / 2, 0], [0, 0, c]]
    places = [[0, 0, 0], [1 / 3, 2 / 3, 0], [0, 0, 0.5], [2 / 3, 1 / 3, 0.5]]
    return make_supercell(Atoms("C4", scaled_positions=places, cell=cell, pbc=True), np.diag([2, 1, 1]))


def rattled(seed: int, amplitude: float) -> Atoms:
    atoms = diamond()
    atoms.rattle(amplitude, seed=seed)
    return atoms


def test_diamond_and_graphite_have_their_textbook_numbers() -> None:
    system, frames = from_atoms(diamond(), graphite())
    np.testing.assert_allclose(crystals.densities(system, frames), [3.515, 2.267], rtol=2e-3)
    np.testing.assert_allclose(crystals.shortest_distances(system, frames), [1.5446, 1.4209], atol=1e-3)
    assert crystals.coordination(system, frames).tolist() == [[4] * 8, [3] * 8]


def test_distances_to_own_images_count() -> None:
    system, frames = from_atoms(bulk("Cu"))
    assert crystals.shortest_distances(system, frames)[0] == pytest.approx(3.61 / math.sqrt(2))
    assert crystals.coordination(system, frames).tolist() == [[12]]


def test_implausible_structures_are_told_apart() -> None:
    close, flat, lost, wide = diamond(), diamond(), diamond(), diamond()
    close.positions[1] = close.positions[0] + 0.2
    flat.set_cell(flat.cell.array * [[1], [1], [1e-6]])
    lost.positions[3] = np.nan
    wide.set_cell(wide.cell.array * 10, scale_atoms=True)
    system, frames = from_atoms(diamond(), close, flat, lost, wide)
    assert crystals.are_plausible(system, frames).tolist() == [True, False, False, False, False]


def test_wasserstein_of_a_shift_is_the_shift() -> None:
    values = np.random.default_rng(0).normal(size=200)
    assert crystals.wasserstein(values, values + 0.3) == pytest.approx(0.3)
    assert crystals.wasserstein(values, values) == 0


def test_samples_are_matched_with_the_structure_they_are() -> None:
    system, known = from_atoms(graphite(), diamond())
    _, samples = from_atoms(rattled(1, 0.03), rattled(2, 0.9), graphite())
    matches = crystals.match_structures(system, samples, known, Similarity(0.2, 0.3, 5, math.inf, math.inf))
    assert matches.known.tolist() == [1, -1, 0]
    assert 0 < matches.rms[0] < 0.05 and math.isnan(matches.rms[1]) and matches.rms[2] == pytest.approx(0, abs=1e-6)
    assert matches.rate == pytest.approx(2 / 3) and matches.novelty == pytest.approx(1 / 3)
    assert matches.coverage(2) == 1


def test_uniqueness_counts_repeats_once() -> None:
    system, frames = from_atoms(diamond(), rattled(1, 0.02), rattled(2, 0.02), graphite())
    assert crystals.uniqueness(system, frames) == 0.5


def test_a_set_compared_with_itself_is_perfect_and_another_is_not() -> None:
    system, known = from_atoms(diamond(), graphite())
    same = crystals.compare(system, known, known)
    assert (same.density, same.shortest_distance, same.coordination) == (0, 0, 0)
    assert (same.plausible, same.match_rate, same.coverage, same.uniqueness) == (1, 1, 1, 1)
    other = crystals.compare(system, from_atoms(diamond(), rattled(1, 0.03))[1], known)
    assert other.coverage == 0.5 and other.density > 0.3 and other.coordination > 0.2 and other.uniqueness == 0.5


def test_frames_without_a_cell_are_refused() -> None:
    system, frames = from_atoms(diamond())
    with pytest.raises(UserError, match="have no cell"):
        crystals.densities(system, Frames(frames.positions, frames.time_ps))
