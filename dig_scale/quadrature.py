"""Densities exp(-u)/Z of one or two coordinates by quadrature: log Z, noised density and score, samples.

p(x_t) = integral of p(y) N(x_t; alpha y, sigma²). Where the normal is wider than the grid's spacing, the trapezoidal rule on
the grid, which separates into one product per coordinate and is exact to exp(-2 pi² (sigma/alpha/spacing)²); where it is
narrower, Gauss-Hermite's rule about x_t/alpha, with the potential itself. Both are differentiable in x_t to all orders.
Knows nothing of potentials but u, its gradient and a box outside of which exp(-u) is nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

_HERMITE_NODES = 12
_CROSSOVER = 1.5
"""Spacings of sigma/alpha from which on the grid is used: 5e-20 of aliasing."""
_DEEPEST = 600.0
"""kT above the minimum that count as this: exp of more is 0 in double precision, and 0/0 no score."""
_FINER = 4
"""Cells of the sampler's grid per spacing; within a cell samples are uniform."""

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Quadrature:
    """energy [B, D] -> [B] in kT and its gradient [B, D] -> [B, D]; D = 1 or 2, box low..high and spacing in Å.

    The spacing must resolve exp(-energy): a third of its narrowest width or less.
    """

    energy: Function
    gradient: Function
    low: tuple[float, ...]
    high: tuple[float, ...]
    spacing: float

    @property
    def log_z(self) -> float:
        """log of the integral of exp(-energy)."""
        return float(torch.logsumexp(-self._energies.flatten(), 0)) + len(self.low) * math.log(self.spacing)

    def noised_log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p(x_t) [B] at x_t [B, D] with alpha and sigma [B]."""
        return self._by_width(self._log_density_near, self._log_density_far, x, alpha, sigma)

    def noised_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """grad log p(x_t) [B, D]."""
        return self._by_width(self._score_near, self._score_far, x, alpha, sigma)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Samples [n, D], fp64, from a grid four times finer, uniform within its cells."""
        fine = self.spacing / _FINER
        axes = self._axes(fine)
        chances = torch.softmax(-self._table(axes).flatten(), 0)
        # torch.multinomial stops at 2^24 categories and single draws of float32 precision; the inverse of the sum does not
        drawn = torch.rand(n, generator=generator, dtype=torch.float64)
        cell = torch.searchsorted(chances.cumsum(0), drawn).clamp(max=len(chances) - 1)
        places = torch.unravel_index(cell, [len(axis) for axis in axes])
        centres = torch.stack([axis[place] for axis, place in zip(axes, places, strict=True)], dim=1)
        return centres + fine * (torch.rand(centres.shape, generator=generator, dtype=torch.float64) - 0.5)

    def _axes(self, spacing: float) -> tuple[Tensor, ...]:
        return tuple(
            low + spacing * torch.arange(math.ceil((high - low) / spacing) + 1, dtype=torch.float64)
            for low, high in zip(self.low, self.high, strict=True)
        )

    def _table(self, axes: tuple[Tensor, ...]) -> Tensor:
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        return self.energy(points.flatten(0, -2)).reshape(points.shape[:-1])

    @cached_property
    def _energies(self) -> Tensor:
        return self._table(self._axes(self.spacing))

    @cached_property
    def _weights(self) -> Tensor:
        """Probabilities of the grid's points."""
        return torch.exp(-(self._energies - self._energies.min()).clamp(max=_DEEPEST)) * self._lift

    @cached_property
    def _lift(self) -> float:
        return math.exp(-float(self._energies.min()) + len(self.low) * math.log(self.spacing) - self.log_z)

    @cached_property
    def _hermite(self) -> tuple[Tensor, Tensor]:
        """Nodes [Q, D] and log-weights [Q] of the expectation over standard normals."""
        nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(_HERMITE_NODES))
        logs = torch.log(weights / weights.sum())
        if len(self.low) == 1:
            return nodes.unsqueeze(-1), logs
        return torch.cartesian_prod(nodes, nodes), (logs.unsqueeze(1) + logs).flatten()

    def _by_width(
        self,
        near: Callable[[Tensor, Tensor, Tensor], Tensor],
        far: Callable[[Tensor, Tensor, Tensor], Tensor],
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
    ) -> Tensor:
        wide, alpha, sigma = x.double(), alpha.double(), sigma.double()
        narrow = sigma < _CROSSOVER * self.spacing * alpha
        first, second = narrow.nonzero().squeeze(1), (~narrow).nonzero().squeeze(1)
        parts = [
            rule(wide[rows], alpha[rows], sigma[rows]) for rule, rows in ((near, first), (far, second)) if len(rows)
        ]
        return torch.cat(parts)[torch.argsort(torch.cat([first, second]))].to(x.dtype)

    def _around(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Points [B, Q, D] about x_t/alpha and the logarithms [B, Q] of their shares times Z."""
        nodes, logs = self._hermite
        points = (x.unsqueeze(1) + sigma[:, None, None] * nodes) / alpha[:, None, None]
        return points, logs - self.energy(points.flatten(0, 1)).view(len(x), -1)

    def _log_density_near(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        logs = self._around(x, alpha, sigma)[1]
        return torch.logsumexp(logs, dim=1) - self.log_z - x.shape[1] * torch.log(alpha)

    def _score_near(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        points, logs = self._around(x, alpha, sigma)
        slopes = -self.gradient(points.flatten(0, 1)).view_as(points)
        return (torch.softmax(logs, dim=1).unsqueeze(-1) * slopes).sum(1) / alpha.unsqueeze(-1)

    def _kernels(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """By coordinate exp(-(x - alpha y)²/(2 sigma²)) over its largest, (alpha y - x)/sigma², exponent of the largest."""
        values, slopes, tops = [], [], torch.zeros_like(alpha)
        for k, axis in enumerate(self._axes(self.spacing)):
            offset = (alpha.unsqueeze(-1) * axis - x[:, k : k + 1]) / sigma.unsqueeze(-1)
            exponent = -0.5 * offset**2
            top = exponent.detach().amax(1, keepdim=True)
            values.append(torch.exp(exponent - top))
            slopes.append(offset / sigma.unsqueeze(-1))
            tops = tops + top.squeeze(1)
        return values, slopes, tops

    def _sum(self, kernels: list[Tensor]) -> Tensor:
        rows = kernels[0] @ self._weights
        return rows if len(kernels) == 1 else (rows * kernels[1]).sum(-1)

    def _log_density_far(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        values, _, tops = self._kernels(x, alpha, sigma)
        return torch.log(self._sum(values)) + tops - 0.5 * x.shape[1] * torch.log(2 * math.pi * sigma**2)

    def _score_far(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        values, slopes, _ = self._kernels(x, alpha, sigma)
        along = [
            self._sum([value * slope if j == k else value for j, value in enumerate(values)])
            for k, slope in enumerate(slopes)
        ]
        return torch.stack(along, dim=1) / self._sum(values).unsqueeze(-1)
