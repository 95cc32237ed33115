"""Noise schedules: DiG's published numbers, inverses, rates against finite differences."""

from __future__ import annotations

import pytest
import torch

from dig_scale.config import Diffusion
from dig_scale.diffusion.schedule import DigSigmoid, alpha_sigma, schedule_from

ALL = [Diffusion(schedule=name) for name in ("dig-sigmoid", "log-linear", "power")]


@pytest.mark.parametrize(
    ("steps", "end", "betas", "alpha_bars"),
    [
        (5000, 2e-3, (5.04500e-6, 1.000650e-3, 1.995055e-3), (0.99999493, 0.56167603, 6.70819e-3)),
        (500, 2e-2, (4.95522e-5, 1.0060170e-2, 1.9950548e-2), (0.99995047, 0.55645168, 6.45915e-3)),
    ],
)
def test_dig_schedule_has_the_published_values(steps: int, end: float, betas: tuple, alpha_bars: tuple) -> None:
    schedule = DigSigmoid(steps, 1e-7, end)
    picks = [0, steps // 2, steps - 1]
    assert schedule.betas[picks].tolist() == pytest.approx(betas, rel=2e-5)
    assert schedule.alpha_bar[picks].tolist() == pytest.approx(alpha_bars, rel=2e-5)
    t = torch.tensor(picks, dtype=torch.float64) / (steps - 1)
    alpha, _ = alpha_sigma(schedule.noise_std(t))
    assert (alpha**2).tolist() == pytest.approx(alpha_bars, rel=2e-5)


@pytest.mark.parametrize("config", ALL, ids=lambda c: c.schedule)
def test_time_is_the_inverse_of_noise(config: Diffusion) -> None:
    schedule, t = schedule_from(config), torch.linspace(0.001, 0.999, 57, dtype=torch.float64)
    assert torch.allclose(schedule.time_of(schedule.noise_std(t)), t, atol=1e-9)


@pytest.mark.parametrize("config", ALL, ids=lambda c: c.schedule)
def test_log_rate_is_the_derivative_of_log_noise(config: Diffusion) -> None:
    schedule, t = schedule_from(config), torch.linspace(0.0113, 0.9871, 41, dtype=torch.float64)
    h = 1e-7
    difference = (torch.log(schedule.noise_std(t + h)) - torch.log(schedule.noise_std(t - h))) / (2 * h)
    assert torch.allclose(schedule.log_rate(t), difference, rtol=1e-5)


@pytest.mark.parametrize("config", ALL, ids=lambda c: c.schedule)
def test_process_is_variance_preserving(config: Diffusion) -> None:
    alpha, sigma = alpha_sigma(schedule_from(config).noise_std(torch.linspace(0, 1, 11, dtype=torch.float64)))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha))
