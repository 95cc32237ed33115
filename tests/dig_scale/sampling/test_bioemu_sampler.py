"""BioEmu's processes and samplers against numbers of its published code and exact scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dig_scale.batch import State
from dig_scale.diffusion.rotation import RotationProcess
from dig_scale.sampling.bioemu import (
    AngleTable,
    BioEmuNoise,
    BioEmuSteps,
    bioemu_prior,
    dpm_solver,
    heun,
)
from dig_scale.sampling.released import Walk

SPREAD = 20.0
SMALL = BioEmuNoise(angles=AngleTable(num_sigma=200, num_omega=200, l_max=300, eps_t=1e-3))


def walk(count: int = 300) -> Walk:
    index = torch.arange(count)
    return Walk(torch.full_like(index, 2), index)


def exact(positions: Tensor, rotations: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Answers for positions N(0, SPREAD^2) in Å and one orientation, the identity; the kernel's e is sigma / sqrt 2."""
    alpha, sigma = SMALL.alpha(t)[:, None, None], SMALL.sigma(t)[:, None, None]
    process = RotationProcess(0.02 / math.sqrt(2), 1.65 / math.sqrt(2))
    score = process.target(torch.eye(3).expand_as(rotations), rotations, t)
    return -sigma * positions / (alpha**2 * SPREAD**2 + sigma**2), score / SMALL.angle_scale(t)[:, None, None]


def angles(state: State) -> Tensor:
    assert state.rotations is not None
    trace = state.rotations.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.acos(((trace - 1) / 2).clamp(-1, 1))


def test_rotation_scales_are_the_tabulated_ones() -> None:
    noise = BioEmuNoise(angles=AngleTable(num_sigma=12, eps_t=1e-3))
    found = noise.angle_scale(torch.tensor([0.001, 0.5, 0.99]))
    torch.testing.assert_close(found, torch.tensor([43.89052582, 3.93994117, 0.15578794]), atol=0, rtol=1e-5)


def test_times_and_ratios_are_inverse_to_each_other() -> None:
    t = torch.linspace(0.01, 0.98, 50)
    torch.testing.assert_close(SMALL.time_of(SMALL.log_ratio(t)), t, atol=1e-4, rtol=1e-4)


def test_rates_are_the_derivatives_of_the_levels() -> None:
    t = torch.linspace(0.05, 0.9, 20, dtype=torch.float64)
    h = 1e-5
    slope = (torch.log(SMALL.alpha(t + h)) - torch.log(SMALL.alpha(t - h))) / (2 * h)
    torch.testing.assert_close(SMALL.drift_rate(t), -2 * slope, atol=1e-5, rtol=1e-6)
    growth = (SMALL.angle_sigma(t + h) ** 2 - SMALL.angle_sigma(t - h) ** 2) / (2 * h)
    torch.testing.assert_close(SMALL.angle_rate(t), growth, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["dpm", "heun"])
def test_deterministic_samplers_carry_the_prior_to_the_data(name: str) -> None:
    start, grid = bioemu_prior(2, walk(50)), BioEmuSteps(60)
    final = (dpm_solver if name == "dpm" else heun)(exact, start, walk(50), SMALL, grid)
    assert start.positions is not None and final.positions is not None

    def deviation(t: float) -> float:
        level = torch.tensor(t, dtype=torch.float64)
        return math.hypot(SMALL.alpha(level).item() * SPREAD, SMALL.sigma(level).item())

    # the published Heun loop ends with an Euler step past t = 0
    end = grid.eps_t if name == "dpm" else 0.0
    expected = start.positions * deviation(end) / deviation(grid.max_t)
    torch.testing.assert_close(final.positions, expected, atol=0.2, rtol=0.02)
    assert angles(final).max() < 0.15


def test_noised_heun_steps_draw_from_the_data() -> None:
    final = heun(exact, bioemu_prior(1, walk()), walk(), SMALL, BioEmuSteps(60, churn=0.5))
    assert final.positions is not None
    assert final.positions.std().item() == pytest.approx(SPREAD, rel=0.1)  # 900 numbers: 2.4 % of statistical error
    assert angles(final).square().mean().sqrt() < 0.15


def test_priors_are_of_ten_angstrom_and_uniform() -> None:
    start = bioemu_prior(10, walk(1000))
    assert start.positions is not None and start.rotations is not None
    assert start.positions.std().item() == pytest.approx(10.0, rel=0.03)
    torch.testing.assert_close(start.rotations.mean((0, 1)), torch.zeros(3, 3), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.linalg.det(start.rotations), torch.ones(1000, 10))


def test_a_walker_does_not_depend_on_its_batch() -> None:
    last = Walk(walk(3).seed[2:], walk(3).index[2:])
    grid = BioEmuSteps(10, churn=0.5)
    together = heun(exact, bioemu_prior(4, walk(3)), walk(3), SMALL, grid).positions
    alone = heun(exact, bioemu_prior(4, last), last, SMALL, grid).positions
    assert together is not None and alone is not None
    torch.testing.assert_close(together[2:], alone, atol=1e-3, rtol=1e-4)
