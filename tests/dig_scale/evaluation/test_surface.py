"""Sites, maps and heights on surfaces, against structures of known sites and distributions of known shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from dig_scale.config import SurfaceSpec
from dig_scale.errors import UserError
from dig_scale.evaluation.surface import (
    SurfaceLattice,
    Symmetry,
    adsorbate_heights,
    classified,
    compared_heights,
    density_map,
    energy_map,
    lateral_divergence,
    lateral_free_energy,
    lateral_histogram,
    map_agreement,
    populations,
    probe_positions,
    site_labels,
    surface_lattice,
)
from dig_scale.importers.catalyst import read_catalyst, surface_system
from dig_scale.system import SiteRole, System
from dig_scale.units import thermal_energy

FACETS = [
    ("fcc111", "Cu", ("ontop", "bridge", "fcc", "hcp"), "p3m1"),
    ("hcp0001", "Ru", ("ontop", "bridge", "fcc", "hcp"), "p3m1"),
    ("fcc100", "Ni", ("ontop", "bridge", "hollow"), "p4mm"),
    ("fcc110", "Ag", ("ontop", "longbridge", "shortbridge", "hollow"), "p2mm"),
]


def _system(**changes: Any) -> System:
    return surface_system("s", SurfaceSpec.model_validate({"metal": "Cu", "lattice_constant": 3.6} | changes))


def _with_adsorbate_at(system: System, fractions: np.ndarray, height: float = 1.2) -> np.ndarray:
    """Frames [F, N, 3] with the adsorbate at fractions [F, 2] of the primitive cell."""
    lattice = surface_lattice(system)
    positions = np.repeat(system.reference_positions[None], len(fractions), axis=0)
    positions[:, -1] = lattice.origin + fractions @ lattice.vectors + height * lattice.normal
    return positions


def _quarter_monolayers(shared_data: Path) -> Iterator[tuple[str, str, Atoms]]:
    structures = json.loads((shared_data / "adsorption_fcc111" / "structures.json").read_text())
    for metal, guests in structures.items():
        for guest, sites in guests.items():
            for site, coverages in sites.items():
                one = coverages["0.25"]
                atoms = Atoms(one["symbols"], positions=one["pos"], cell=one["cell"], pbc=True)
                yield f"{metal}-{guest}-{site}", site, atoms


def test_every_relaxed_structure_is_at_the_site_of_its_label(shared_data: Path, tmp_path: Path) -> None:
    wrong, count = [], 0
    for name, site, atoms in _quarter_monolayers(shared_data):
        write(tmp_path / "one.traj", atoms)
        system, frames = read_catalyst(name, tmp_path / "one.traj")
        count += 1
        if site_labels(system, frames.positions).tolist() != [[site]]:
            wrong.append(name)
    assert count >= 128 and not wrong


@pytest.mark.parametrize(("facet", "metal", "sites", "group"), FACETS)
def test_sites_of_built_surfaces_are_found_in_any_cell(
    facet: str, metal: str, sites: tuple[str, ...], group: str
) -> None:
    for site in sites:
        system = _system(facet=facet, metal=metal, lattice_constant=None, site=site, size=(2, 3, 4))
        assert site_labels(system, system.reference_positions[None]).tolist() == [[site]]
    assert surface_lattice(system).group == group


@pytest.mark.parametrize(("facet", "metal", "sites", "group"), FACETS)
def test_operations_of_the_plane_group_keep_lengths_and_sites(
    facet: str, metal: str, sites: tuple[str, ...], group: str
) -> None:
    lattice = surface_lattice(_system(facet=facet, metal=metal, lattice_constant=None, site="ontop"))
    assert len(lattice.operations) == {"p3m1": 6, "p4mm": 8, "p2mm": 4}[group]
    fractions = np.random.default_rng(0).random((300, 2))
    metric = lattice.vectors @ lattice.vectors.T
    labels = _labels(lattice, fractions)
    assert set(labels) == set(sites)
    for operation in lattice.operations:
        assert np.allclose(operation.T @ metric @ operation, metric, atol=1e-3)
        assert (_labels(lattice, fractions @ operation.T) == labels).all()


def _labels(lattice: SurfaceLattice, fractions: np.ndarray) -> np.ndarray:
    return np.array(lattice.names)[classified(lattice, lattice.origin + fractions @ lattice.vectors)]


def test_populations_are_the_areas_of_the_voronoi_cells_for_a_uniform_adsorbate() -> None:
    system = _system()
    side = (np.arange(60) + 0.37) / 60
    fractions = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    found = populations(system, _with_adsorbate_at(system, 3 * fractions - 1))
    assert sum(found.values()) == pytest.approx(1.0)
    # cut at half-way between neighbouring sites, a hexagon about the atom, quadrangles about bridges, triangles in hollows
    assert found["fcc"] == pytest.approx(found["hcp"], abs=0.01)
    assert found["ontop"] == pytest.approx(0.25, abs=0.01)


def test_drift_of_the_whole_top_layer_changes_no_site_and_no_height() -> None:
    system = _system(site="hcp")
    drifted = system.reference_positions.copy()
    drifted[system.roles != SiteRole.SUBSURFACE] += [0.9, -0.4, 0.3]
    assert site_labels(system, drifted[None]).tolist() == [["hcp"]]
    assert adsorbate_heights(system, drifted[None])[0, 0] == pytest.approx(1.2)


def test_lateral_map_gives_back_a_known_free_energy() -> None:
    system, kelvin, n = _system(), 600.0, 12
    depth = 0.05
    random = np.random.default_rng(5)
    trial = random.random((200_000, 2))
    energy = depth * np.cos(2 * np.pi * np.floor(trial[:, 0] * n) / n)
    kept = trial[random.random(len(trial)) < np.exp(-(energy + depth) / thermal_energy(kelvin))]
    profile = lateral_free_energy(lateral_histogram(system, _with_adsorbate_at(system, kept), n), kelvin)
    expected = depth * (1 + np.cos(2 * np.pi * np.arange(n) / n))
    # about 70,000 counts in 144 bins: the rarest hold 100, an error of 0.1 kT
    assert np.allclose(profile - profile.mean(), (expected - expected.mean())[:, None], atol=0.02)


def test_symmetrised_map_has_the_symmetry_and_keeps_the_counts() -> None:
    system = _system()
    positions = _with_adsorbate_at(system, 0.15 * np.random.default_rng(1).normal(size=(500, 2)) + [0.3, 0.4])
    plain = lateral_histogram(system, positions, 9)
    symmetric = lateral_histogram(system, positions, 9, Symmetry.SURFACE)
    assert symmetric.sum() == pytest.approx(plain.sum()) == pytest.approx(500)
    # the mirror exchanges the two vectors
    assert np.allclose(symmetric, symmetric.T) and not np.allclose(plain, plain.T)


def test_divergence_of_maps_is_zero_for_equal_and_log_two_for_disjoint_ones() -> None:
    system = _system()
    top = lateral_histogram(system, _with_adsorbate_at(system, np.array([[0.02, 0.02]])), 6)
    hollow = lateral_histogram(system, _with_adsorbate_at(system, np.array([[0.35, 0.35]])), 6)
    assert lateral_divergence(top, top) == pytest.approx(0)
    assert lateral_divergence(top, hollow) == pytest.approx(np.log(2))
    with pytest.raises(UserError, match="same bins"):
        lateral_divergence(top, lateral_histogram(system, system.reference_positions[None], 5))


def test_heights_count_from_the_top_layer_and_are_compared() -> None:
    system = _system()
    low = np.concatenate([_with_adsorbate_at(system, np.zeros((1, 2)), z) for z in (1.0, 1.1, 1.2, 1.3)])
    heights = adsorbate_heights(system, low)
    assert heights.ravel() == pytest.approx([1.0, 1.1, 1.2, 1.3])
    same = compared_heights(heights, heights, 10)
    assert same.divergence == pytest.approx(0) and same.mean == pytest.approx(1.15)
    other = compared_heights(heights + 5, heights, 10)
    assert other.mean - other.reference_mean == pytest.approx(5) and other.divergence > 0.2
    with pytest.raises(UserError, match="more than one"):
        compared_heights(heights, heights[:1], 10)


def test_probes_stand_over_the_grid_and_move_the_adsorbate_alone() -> None:
    system = _system(adsorbate="CO", site="ontop", height=1.8)
    probes = probe_positions(system, 4, [1.0, 1.5])
    assert probes.shape == (4, 4, 2, 18, 3) and system.cell is not None
    slab = system.roles != SiteRole.ADSORBATE
    assert (probes[..., slab, :] == system.reference_positions[slab]).all()
    # CO stands on carbon, its second atom
    carbon = probes[..., 17, :]
    assert np.allclose(carbon[1, 2, 0, :2], (system.cell[0] / 4 + system.cell[1] / 2)[:2])
    top = system.reference_positions[slab][:, 2].max()
    assert np.allclose(carbon[..., 0, 2] - top, 1.0) and np.allclose(carbon[..., 1, 2] - top, 1.5)
    bond = system.reference_positions[16] - system.reference_positions[17]
    assert np.allclose(probes[..., 16, :] - carbon, bond)


def test_maps_take_the_best_height_of_every_point_and_agree_when_boltzmann() -> None:
    system = _system()
    assert system.cell is not None
    inverse = np.linalg.pinv(system.cell[:2])
    top = system.reference_positions[15, 2]

    def energy(positions: np.ndarray) -> np.ndarray:
        where, height = positions[:, -1] @ inverse, positions[:, -1, 2] - top
        return np.cos(2 * np.pi * where).sum(axis=1) + (height - 1.3) ** 2

    heights = np.linspace(1.0, 1.6, 7)
    energies = energy_map(energy, system, 8, heights)
    density = density_map(lambda positions: -energy(positions) / 0.05, system, 8, heights)
    side = np.cos(2 * np.pi * np.arange(8) / 8)
    assert np.allclose(energies, side[:, None] + side, atol=1e-8)
    agreement = map_agreement(density, energies)
    assert agreement.pearson == pytest.approx(1) and agreement.spearman == pytest.approx(1)
    assert map_agreement(-density, energies).pearson == pytest.approx(-1)
    with pytest.raises(UserError, match="shape"):
        density_map(lambda positions: positions, system, 8, heights)


def test_what_is_no_flat_surface_with_an_adsorbate_is_refused() -> None:
    clean = _system(adsorbate=None)
    with pytest.raises(UserError, match="no adsorbate"):
        site_labels(clean, clean.reference_positions[None])
    with pytest.raises(UserError, match="at 71 degrees"):
        surface_lattice(_system(facet="bcc110", metal="Fe", lattice_constant=2.87, site="ontop"))
    stepped = _system()
    kept = np.delete(np.arange(stepped.n_sites), 15)
    with pytest.raises(UserError, match="no single lattice"):
        surface_lattice(stepped.select(kept))
