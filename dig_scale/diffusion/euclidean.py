"""The Gaussian process on R^3: x_t = alpha x_0 + sigma noise. `vp` (alpha² + sigma² = 1) is a constructor of it.

Values are [B, N, 3]; noise that leaves the centre of mass alone is the caller's affair (composition).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dig_scale.diffusion.process import Coefficients
from dig_scale.diffusion.schedule import Schedule, alpha_sigma


@dataclass(frozen=True)
class VariancePreserving:
    """VP process of a schedule; the prior is a standard normal (Å)."""

    schedule: Schedule

    def perturb(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """alpha x_0 + sigma noise."""
        alpha, sigma = alpha_sigma(self.schedule.noise_std(t))
        return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise

    def target(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """-(x_t - alpha x_0)/sigma²."""
        alpha, sigma = alpha_sigma(self.schedule.noise_std(t))
        return (per_sample(alpha, x0) * x0 - xt) / per_sample(sigma, x0) ** 2

    def coefficients(self, t: Tensor) -> Coefficients:
        """drift = d log alpha/dt, diffusion = 2 sigma² d log(sigma/alpha)/dt (the VP form of Song et al. 2021)."""
        noise_std = self.schedule.noise_std(t)
        alpha, sigma = alpha_sigma(noise_std)
        rate = self.schedule.log_rate(t)
        return Coefficients(alpha, sigma, drift=-(sigma**2) * rate, diffusion=2 * sigma**2 * rate)

    def move(self, x: Tensor, tangent: Tensor) -> Tensor:
        """Sum."""
        return x + tangent

    def sample_prior(self, noise: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def prior_log_density(self, x: Tensor, degrees: Tensor) -> Tensor:
        """Standard normal in `degrees` dimensions; nat."""
        return -0.5 * (x**2).flatten(1).sum(-1) - 0.5 * degrees * math.log(2 * math.pi)


def vp(schedule: Schedule) -> VariancePreserving:
    """Variance-preserving process of a schedule."""
    return VariancePreserving(schedule)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """values [B] shaped to multiply like [B, ...]."""
    return values.to(like.dtype).view(-1, *([1] * (like.dim() - 1)))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean [B, 1, 3] of x [B, N, 3] over sites where mask [b, N]."""
    weight = mask.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


def centred(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, N, 3] with the mean over masked sites removed and absent sites 0."""
    return torch.where(mask.unsqueeze(-1), x - masked_mean(x, mask), torch.zeros((), dtype=x.dtype, device=x.device))
