"""Means of restrained dynamics against those that Tweedie's formula gives of exact scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dig_scale.simulation.posterior import Dynamics, posterior_means, steps_of
from dig_scale.simulation.potential import AnalyticPotential
from dig_scale.toys import DoubleWell, HarmonicCrystal, Toy
from tests.molecules import five_beads

WELL = DoubleWell(barrier=3.0, width=0.6, dimension=15)
_STIFFNESS = torch.logspace(0, 3, 15, dtype=torch.float64)
CRYSTAL = HarmonicCrystal(torch.diag(_STIFFNESS))
"""Widths from 1 to 0.03 Å."""


def potential_of(toy: Toy) -> AnalyticPotential:
    return AnalyticPotential(five_beads(), 300.0, lambda x: toy.reduced_energy(x.flatten(1)))


def exact_means(toy: Toy, noised: np.ndarray, noise_std: np.ndarray) -> np.ndarray:
    """y + sigma² score, by Tweedie's formula."""
    y, sigma = torch.as_tensor(noised).flatten(1), torch.as_tensor(noise_std)
    score: Tensor = toy.noised_score(y, torch.ones_like(sigma), sigma)
    return (y + sigma[:, None] ** 2 * score).view(-1, 5, 3).numpy()


@pytest.mark.parametrize("toy", [WELL, CRYSTAL], ids=["double-well", "crystal"])
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.5])
def test_means_are_those_of_the_exact_score_wherever_the_noised_structures_come_from(toy: Toy, noise: float) -> None:
    """Noised structures of uniform ones, which no Boltzmann distribution has."""
    generator = np.random.default_rng(3)
    start = generator.uniform(-0.9, 0.9, (400, 5, 3))
    noise_std = noise * generator.uniform(0.8, 1.2, 400)
    noised = start + noise_std[:, None, None] * generator.standard_normal(start.shape)
    dynamics = Dynamics(step=0.02, periods=8)
    found = posterior_means(potential_of(toy), noised, noise_std, start, dynamics, generator)
    expected = exact_means(toy, noised, noise_std)
    errors = (found - expected) / noise_std[:, None, None]
    shift = (expected - noised) / noise_std[:, None, None]
    # no bias, along what the energy pulls at or anywhere; and an error that is no larger than the noise
    along = (errors * shift).sum() / (shift**2).sum()
    scatter = np.sqrt(((errors * shift) ** 2).sum()) / (shift**2).sum()
    assert abs(along) < 4 * scatter + 0.01, (along, scatter)
    assert np.abs(errors.mean(0)).max() < 4.5 * errors.std() / np.sqrt(len(errors)) + 0.01
    assert errors.std() < 0.7


def test_longer_dynamics_scatter_less() -> None:
    generator = np.random.default_rng(1)
    start = generator.uniform(-0.5, 0.5, (100, 5, 3))
    noise_std = np.full(100, 0.2)
    noised = start + 0.2 * generator.standard_normal(start.shape)
    expected = exact_means(CRYSTAL, noised, noise_std)
    spreads = []
    for periods in (2, 32):
        dynamics = Dynamics(step=0.02, periods=periods)
        means = posterior_means(potential_of(CRYSTAL), noised, noise_std, start, dynamics, generator)
        spreads.append((means - expected).std())
    assert spreads[1] < 0.45 * spreads[0], spreads


def test_what_is_fixed_stays_and_what_has_no_energy_is_lost() -> None:
    mobile = np.array([True, False, True, True, False])
    generator = np.random.default_rng(0)
    start = generator.uniform(-0.5, 0.5, (6, 5, 3))
    noise_std = np.full(6, 0.1)

    def broken(x: Tensor) -> Tensor:
        return torch.where(x[:, 0, 0] > 50, torch.nan, CRYSTAL.reduced_energy(x.flatten(1)))

    potential = AnalyticPotential(replace(five_beads(), mobile=mobile), 300.0, broken)
    start[2] = 100.0
    noised = start + 0.1 * generator.standard_normal(start.shape) * mobile[:, None]
    found = posterior_means(potential, noised, noise_std, start, Dynamics(), generator)
    kept = np.delete(np.arange(6), 2)
    assert np.isnan(found[2]).all() and np.isfinite(found[kept]).all()
    np.testing.assert_allclose(found[kept][:, ~mobile], start[kept][:, ~mobile], atol=1e-12)
    assert np.abs(found[kept][:, mobile] - start[kept][:, mobile]).max() > 0.01


def test_steps_follow_the_restraint() -> None:
    """25 in a period of the finest noise, and as long as the coarsest needs at the step that was asked for."""
    steps, size = steps_of(np.array([0.004, 1.0]), Dynamics(step=0.01, periods=2))
    np.testing.assert_allclose(size, [0.001, 0.01])
    assert steps == pytest.approx(2 * 2 * np.pi / 0.01, abs=1)
