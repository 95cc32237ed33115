"""Systems with exact answers: densities whose noised score and log-density are known in closed form, and model potentials.

They serve as tests of every process, solver and estimator, and as sanity checks for users' own code.
All tensors are [B, D] (flattened coordinates, Å), energies in units of kT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianMixture:
    """Mixture of isotropic Gaussians: means [K, D], std [K], weights [K] (summing to 1)."""

    means: Tensor
    std: Tensor
    weights: Tensor

    def noised_log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p(x_t) [B] for x_t = alpha x_0 + sigma noise, alpha and sigma [B]."""
        return torch.logsumexp(self._terms(x, alpha, sigma)[0], dim=-1)

    def noised_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """grad log p(x_t) [B, D]."""
        terms, offset, variance = self._terms(x, alpha, sigma)
        share = torch.softmax(terms, dim=-1) / variance
        return -(share.unsqueeze(-1) * offset).sum(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Clean samples [n, D]."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[component] + self.std[component, None] * noise

    def _terms(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance = alpha[:, None] ** 2 * self.std**2 + sigma[:, None] ** 2
        offset = x[:, None] - alpha[:, None, None] * self.means
        square = (offset**2).sum(-1)
        norm = 0.5 * x.shape[1] * torch.log(2 * math.pi * variance)
        return torch.log(self.weights) - 0.5 * square / variance - norm, offset, variance


@dataclass(frozen=True)
class DoubleWell:
    """u(x) = barrier ((x_0/width)² - 1)² + |x_rest|²/2, in kT: two equal minima at x_0 = ±width."""

    barrier: float
    width: float

    def reduced_energy(self, x: Tensor) -> Tensor:
        """[B]."""
        return self.barrier * ((x[:, 0] / self.width) ** 2 - 1) ** 2 + 0.5 * (x[:, 1:] ** 2).sum(-1)


@dataclass(frozen=True)
class HarmonicCrystal:
    """u(x) = x·K·x/2 in kT with K [D, D] positive definite: Gaussian with covariance K^-1."""

    stiffness: Tensor

    def reduced_energy(self, x: Tensor) -> Tensor:
        """[B]."""
        return 0.5 * torch.einsum("bi,ij,bj->b", x, self.stiffness, x)

    def log_density(self, x: Tensor) -> Tensor:
        """Normalised log-density [B]."""
        dimension = self.stiffness.shape[0]
        return 0.5 * torch.logdet(self.stiffness) - 0.5 * dimension * math.log(2 * math.pi) - self.reduced_energy(x)
