"""Basins, transitions, correlation times and effective sample sizes against known answers."""

from __future__ import annotations

import numpy as np
import pytest

from dig_scale.evaluation import thermodynamics
from tests.dig_scale.evaluation.conftest import autoregressive


@pytest.mark.parametrize("r", [0.5, 0.9, 0.97])
def test_inefficiency_of_an_autoregressive_process_is_known(r: float) -> None:
    found = [
        thermodynamics.statistical_inefficiency([autoregressive(r, 30_000, seed) for seed in (k, 50 + k)])
        for k in range(5)
    ]
    # The sum to the first zero carries noise of about 2 sqrt(g / F); 60,000 frames, five repeats.
    assert np.mean(found) == pytest.approx((1 + r) / (1 - r), rel=0.12)


def test_independent_frames_have_inefficiency_one_and_constants_too() -> None:
    noise = np.random.default_rng(0).normal(size=20_000)
    assert thermodynamics.statistical_inefficiency([noise]) == pytest.approx(1.0, abs=0.1)
    assert thermodynamics.statistical_inefficiency([np.full(100, 3.0)]) == 1.0


def test_trajectories_stuck_in_different_states_are_not_independent_frames() -> None:
    generator = np.random.default_rng(0)
    stuck = [generator.normal(loc, 0.1, size=1000) for loc in (-1.0, 1.0)]
    assert thermodynamics.statistical_inefficiency(stuck) > 500


def test_every_place_on_the_map_is_in_one_basin() -> None:
    special = np.radians([-180, -120, -1e-18, 0, 1e-18, 50, 180, 49.999999, -179.999999])
    phi, psi = (grid.ravel() for grid in np.meshgrid(special, special))
    random = np.random.default_rng(0).uniform(-np.pi, np.pi, size=(2, 5000))
    assert (thermodynamics.assign_basins(phi, psi) >= 0).all()
    assert (thermodynamics.assign_basins(*random) >= 0).all()


@pytest.mark.parametrize(
    ("phi", "psi", "basin"),
    [(-80, -20, "αR"), (-80, 150, "β / PII"), (-150, 170, "β / PII"), (-80, -170, "β / PII"), (55, 40, "φ > 0")],
)
def test_conformers_fall_in_their_basin(phi: float, psi: float, basin: str) -> None:
    index = thermodynamics.assign_basins(np.radians([phi]), np.radians([psi]))[0]
    assert thermodynamics.BASINS[index].name == basin


def test_only_arrivals_deep_in_a_basin_are_counted() -> None:
    phi = np.radians([-80, -80, -5, 5, -5, -80, 60, 60, 5, 60, -80.0])
    psi = np.radians([150, -20, -20, -20, -20, -20, 40, 40, 40, 40, 150.0])
    one = np.zeros(len(phi), int)
    assert thermodynamics.count_arrivals(phi, psi, one).tolist() == [1, 1, 1]


def test_crossing_the_edge_of_the_map_is_no_arrival() -> None:
    phi = np.radians([-170, 175, -170, 179, -150.0])
    psi = np.radians([160.0] * 5)
    assert thermodynamics.count_arrivals(phi, psi, np.zeros(5, int)).sum() == 0


def test_jump_between_trajectories_is_no_arrival() -> None:
    phi, psi = np.radians([-80, -80, 60, 60.0]), np.radians([150, 150, 40, 40.0])
    assert thermodynamics.count_arrivals(phi, psi, np.array([0, 0, 1, 1])).sum() == 0
    assert thermodynamics.count_arrivals(phi, psi, np.zeros(4, int)).tolist() == [0, 0, 1]


def test_free_energy_difference_follows_from_populations() -> None:
    values = thermodynamics.free_energy_differences(np.array([0.2, 0.8, 0.0]), base=1)
    assert values[:2].tolist() == pytest.approx([np.log(4), 0.0])
    assert np.isinf(values[2])


def test_free_energy_error_follows_from_counts() -> None:
    generator = np.random.default_rng(0)
    replicates = generator.multinomial(10_000, [0.1, 0.9], size=2000)
    error = thermodynamics.free_energy_errors(replicates, base=1)[0]
    assert error == pytest.approx(np.sqrt(1 / 1000 + 1 / 9000), rel=0.06)  # delta method


def test_effective_sample_size_of_equal_and_of_dominating_weights() -> None:
    assert thermodynamics.kish_ess(np.full(50, -700.0)) == pytest.approx(50)
    assert thermodynamics.kish_ess(np.array([0.0, -50.0, -60.0])) == pytest.approx(1)
    weights = np.exp(np.random.default_rng(0).normal(0, 1.0, size=200_000))
    assert thermodynamics.kish_ess(np.log(weights)) / 200_000 == pytest.approx(np.exp(-1.0), rel=0.05)  # lognormal
