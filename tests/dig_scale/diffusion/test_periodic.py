"""The wrapped normal against the theta function, its symmetries, and walks there and back with exact scores."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from dig_scale.diffusion.euclidean import vp
from dig_scale.diffusion.periodic import WrappedNormal, wrapped_normal_density, wrapped_normal_score
from dig_scale.diffusion.schedule import LogLinear
from dig_scale.geometry.lattice import cell_from_log, log_cell

PROCESS = WrappedNormal(0.005, 0.5)
SIGMAS = [0.005, 0.03, 0.1, 0.2, 0.39, 0.41, 0.5, 1.0]
PLACES = [-0.49, -0.3, -0.12, 0.0, 0.01, 0.07, 0.25, 0.43, 0.5]


def theta_density(d: float, sigma: float) -> mpmath.mpf:
    return mpmath.jtheta(3, mpmath.pi * mpmath.mpf(d), mpmath.exp(-2 * (mpmath.pi * mpmath.mpf(sigma)) ** 2))


def theta_score(d: float, sigma: float) -> float:
    q = mpmath.exp(-2 * (mpmath.pi * mpmath.mpf(sigma)) ** 2)
    slope = mpmath.pi * mpmath.jtheta(3, mpmath.pi * mpmath.mpf(d), q, 1)
    return float(slope / theta_density(d, sigma))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_density_and_score_are_those_of_the_theta_function(sigma: float) -> None:
    # 60 digits resolve the series down to densities of 1e-43
    places = [d for d in PLACES if d**2 < 200 * sigma**2]
    with mpmath.workdps(60):
        density = [float(theta_density(d, sigma)) for d in places]
        score = [theta_score(d, sigma) for d in places]
    d, width = torch.tensor(places, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
    torch.testing.assert_close(
        wrapped_normal_density(d, width), torch.tensor(density, dtype=torch.float64), rtol=1e-10, atol=0
    )
    torch.testing.assert_close(
        wrapped_normal_score(d, width), torch.tensor(score, dtype=torch.float64), rtol=1e-6, atol=1e-9
    )
    scale = float(np.sqrt(np.mean(np.square(score))))
    single = wrapped_normal_score(d.float(), width.float()).double()
    torch.testing.assert_close(single / scale, torch.tensor(score, dtype=torch.float64) / scale, rtol=2e-5, atol=2e-5)


def test_density_is_normalised_and_score_is_its_gradient() -> None:
    sigma = torch.tensor(SIGMAS, dtype=torch.float64)[:, None]
    grid = (torch.arange(4096, dtype=torch.float64) / 4096).requires_grad_()
    density = wrapped_normal_density(grid, sigma)
    torch.testing.assert_close(density.mean(-1), torch.ones(len(SIGMAS), dtype=torch.float64))
    for row, width in zip(density, sigma, strict=True):
        (slope,) = torch.autograd.grad(torch.log(row[row > 1e-250]).sum(), grid, retain_graph=True)
        expected = torch.where(row > 1e-250, wrapped_normal_score(grid, width), 0)
        # half a cell away the gradient jumps between two images; the sum over images has its mean there
        away = (grid - 0.5).abs() > 1e-6
        torch.testing.assert_close(slope[away], expected[away].detach(), rtol=1e-8, atol=1e-8)


def test_score_scale_is_the_root_mean_square_of_the_score() -> None:
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    images = np.arange(-12, 13)
    for sigma, scale in zip(PROCESS.sigma(t).tolist(), PROCESS.score_scale(t).tolist(), strict=True):
        places = (np.arange(20000) + 0.5) / 20000 - 0.5
        across = places[:, None] + images
        parts = np.exp(-0.5 * (across / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        density, slope = parts.sum(1), (-across / sigma**2 * parts).sum(1)
        there = density > 0
        assert scale == pytest.approx(math.sqrt((slope[there] ** 2 / density[there]).sum() / 20000), rel=1e-6)


def test_score_scale_normalises_sampled_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    x0 = torch.rand(6, 20000, 3, generator=generator, dtype=torch.float64)
    xt = PROCESS.perturb(x0, t, torch.randn(x0.shape, generator=generator, dtype=torch.float64))
    scaled = PROCESS.target(x0, xt, t) / PROCESS.score_scale(t)[:, None, None]
    # relative error of a mean of 60,000 squares with kurtosis 3 is 0.6 %; four of these
    torch.testing.assert_close((scaled**2).mean((1, 2)), torch.ones(6, dtype=torch.float64), rtol=0.025, atol=0)


def test_perturbed_coordinates_stay_in_the_cell_and_have_the_process_density() -> None:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.full((1, 40000, 1), 0.9)
    for level in (0.5, 1.0):
        t = torch.tensor([level])
        xt = PROCESS.perturb(x0, t, torch.randn(x0.shape, generator=generator))
        assert (xt >= 0).all() and (xt < 1).all()
        sigma = float(PROCESS.sigma(t))
        moment = torch.exp(2j * math.pi * (xt - 0.9)).mean()
        assert abs(complex(moment) - math.exp(-2 * (math.pi * sigma) ** 2)) < 4 / math.sqrt(40000)


def test_prior_is_uniform_and_a_function_of_its_noise() -> None:
    noise = torch.randn(1, 50000, 1, generator=torch.Generator().manual_seed(2))
    x = PROCESS.sample_prior(noise)
    assert torch.equal(x, PROCESS.sample_prior(noise))
    counts = torch.histc(x, 20, 0, 1)
    # chi² of 19 degrees of freedom: 50 is 1e-4
    assert float(((counts - 2500) ** 2 / 2500).sum()) < 50
    assert torch.equal(PROCESS.sample_prior(torch.tensor([-40.0, 0.0, 40.0])), torch.tensor([0.0, 0.5, 0.0]))
    assert PROCESS.prior_log_density(x, torch.tensor([3])).tolist() == [0.0]


def test_coefficients_are_consistent_with_the_width() -> None:
    t = torch.tensor([0.1, 0.6], dtype=torch.float64, requires_grad=True)
    (rate,) = torch.autograd.grad(PROCESS.variance(t).sum(), t)
    level = PROCESS.coefficients(t)
    torch.testing.assert_close(level.diffusion, rate)
    torch.testing.assert_close(level.sigma**2, PROCESS.variance(t))
    assert level.alpha.tolist() == [1, 1] and level.drift.tolist() == [0, 0]


def test_forward_process_and_target_do_not_depend_on_the_origin() -> None:
    generator = torch.Generator().manual_seed(3)
    x0, noise = torch.rand(2, 5, 3, generator=generator).double(), torch.randn(2, 5, 3, generator=generator).double()
    shift, t = torch.tensor([0.37, 0.81, 0.5]).double(), torch.tensor([0.4, 0.95]).double()
    xt, moved = PROCESS.perturb(x0, t, noise), PROCESS.perturb(PROCESS.move(x0, shift), t, noise)
    torch.testing.assert_close(PROCESS.move(xt, shift), moved)
    torch.testing.assert_close(PROCESS.target(x0, xt, t), PROCESS.target(PROCESS.move(x0, shift), moved, t))


def test_forward_process_and_target_follow_the_order_of_sites_and_of_cell_vectors() -> None:
    generator = torch.Generator().manual_seed(4)
    x0, noise = torch.rand(2, 5, 3, generator=generator), torch.randn(2, 5, 3, generator=generator)
    t = torch.tensor([0.4, 0.95])
    xt = PROCESS.perturb(x0, t, noise)
    target = PROCESS.target(x0, xt, t)
    sites, axes = [4, 2, 0, 1, 3], [2, 0, 1]
    assert torch.equal(
        PROCESS.perturb(x0[:, sites][:, :, axes], t, noise[:, sites][:, :, axes]), xt[:, sites][:, :, axes]
    )
    again = PROCESS.target(x0[:, sites][:, :, axes], xt[:, sites][:, :, axes], t)
    assert torch.equal(again, target[:, sites][:, :, axes])


def test_noise_on_a_cell_follows_the_order_of_its_vectors() -> None:
    """Exchanged vectors are an orthogonal map of log_cell coordinates, which isotropic noise does not see."""
    process = vp(LogLinear(0.01, 20.0))
    generator = torch.Generator().manual_seed(5)
    cell = cell_from_log(0.3 * torch.randn(3, 6, generator=generator, dtype=torch.float64) + 2)
    noise, t = torch.randn(3, 6, generator=generator, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.9]).double()
    swap = [1, 2, 0]
    turn = _orthogonal_map(swap)
    x0 = log_cell(cell)
    torch.testing.assert_close(log_cell(cell[:, swap]), x0 @ turn.mT)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(6, dtype=torch.float64))
    xt = process.perturb(x0, t, noise)
    torch.testing.assert_close(process.perturb(log_cell(cell[:, swap]), t, noise @ turn.mT), xt @ turn.mT)
    torch.testing.assert_close(cell_from_log(xt @ turn.mT), cell_from_log(xt)[:, swap][:, :, swap])


def _orthogonal_map(swap: list[int]) -> Tensor:
    permuted = cell_from_log(1e-6 * torch.eye(6, dtype=torch.float64))[:, swap][:, :, swap]
    return (log_cell(permuted) * 1e6).mT


def reverse_walk(start: Tensor, steps: int, score: object, generator: torch.Generator) -> Tensor:
    """Euler-Maruyama of the reverse equation in the process's own verbs, t = 1 to 0."""
    x, times = start, torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for t, later in itertools.pairwise(times):
        step = PROCESS.variance(t) - PROCESS.variance(later)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = PROCESS.move(x, step * score(x, t) + torch.sqrt(step) * noise)  # type: ignore[operator]
    return x


def test_a_pair_of_atoms_walks_back_from_noise_to_its_distribution() -> None:
    """One pair, first atom anywhere, second at one of two offsets: noise on both adds up in their difference."""
    places = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.0, 0.25]], dtype=torch.float64)
    weights, width = torch.tensor([0.7, 0.3], dtype=torch.float64), 0.03

    def pair_score(x: Tensor, t: Tensor) -> Tensor:
        sigma = torch.sqrt(width**2 + 2 * PROCESS.variance(t))
        offsets = (x[:, 1] - x[:, 0])[:, None] - places
        per_axis = wrapped_normal_density(offsets, sigma)
        share = weights * per_axis.prod(-1)
        share = share / share.sum(-1, keepdim=True)
        s = (share[..., None] * wrapped_normal_score(offsets, sigma)).sum(1)
        return torch.stack([-s, s], dim=1)

    generator = torch.Generator().manual_seed(6)
    start = PROCESS.sample_prior(torch.randn(3000, 2, 3, generator=generator, dtype=torch.float64))
    x = reverse_walk(start, 400, pair_score, generator)
    difference = x[:, 1] - x[:, 0]
    distance = ((difference[:, None] - places + 0.5) % 1 - 0.5).norm(dim=-1)
    nearest = distance.argmin(-1)
    # binomial error of the share is 0.008; the uniform prior adds 1.5 % of bias at most
    assert float((nearest == 0).double().mean()) == pytest.approx(0.7, abs=0.04)
    spread = ((difference - places[nearest] + 0.5) % 1 - 0.5).std()
    assert float(spread) == pytest.approx(math.sqrt(width**2 + 2 * PROCESS.sigma_min**2), rel=0.05)
    assert abs(torch.exp(2j * math.pi * x[:, 0]).mean(0)).max() < 4 / math.sqrt(3000)
