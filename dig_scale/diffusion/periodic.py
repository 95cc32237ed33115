"""The wrapped normal on fractional coordinates: x_t = x_0 + sigma(t) noise, modulo 1, geometric sigma (Jiao et al. 2023).

In and out: values [B, N, 3] in [0, 1), in units of the cell's vectors; every coordinate is a circle of its own, so that
neither an origin, nor an order of sites, nor one of the cell's vectors matters. The density of one coordinate is the theta
function p(d) = sum_k N(d + k; 0, sigma²) = 1 + 2 sum_n q^(n²) cos(2 pi n d), q = exp(-2 pi² sigma²): the first sum converges
fast for small sigma, the second (Poisson's) for large, and at sigma = 1/sqrt(2 pi) both lose a factor exp(-pi n²) per term.
Knows no cells: these are lattice.py's, and a cell's own noise is euclidean.py's on log_cell coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dig_scale.diffusion.euclidean import per_sample
from dig_scale.diffusion.process import Coefficients
from dig_scale.geometry.lattice import wrap

_CROSSOVER = 1 / math.sqrt(2 * math.pi)
_IMAGES = 3
_HARMONICS = 4
_SEPARATE = 0.05
"""Width below which the images of a normal do not overlap in double precision: the circle's half is ten widths off."""
_QUADRATURE_POINTS = 512
"""Ten and more per width: the trapezoidal rule is exact to rounding on periodic functions so well resolved."""


@dataclass(frozen=True)
class WrappedNormal:
    """Process on fractional coordinates; sigma grows geometrically from sigma_min to sigma_max (both in fractions of a
    cell's vector). The prior is uniform, which a sigma_max of 0.5 reaches to 1.5 %.
    """

    sigma_min: float
    sigma_max: float

    def sigma(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Width at t."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def variance(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """sigma² of the noise before wrapping."""
        return self.sigma(t) ** 2

    def perturb(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 + sigma noise, wrapped."""
        return wrap(x0 + per_sample(self.sigma(t), x0) * noise)

    def target(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Gradient of log p(x_t - x_0), by the sum that converges faster at this sigma."""
        return wrapped_normal_score(xt - x0, per_sample(self.sigma(t), x0))

    def coefficients(self, t: Tensor) -> Coefficients:
        """alpha = 1, no drift, diffusion = d sigma²/dt."""
        sigma = self.sigma(t)
        diffusion = 2 * sigma**2 * math.log(self.sigma_max / self.sigma_min)
        return Coefficients(torch.ones_like(t), sigma, torch.zeros_like(t), diffusion)

    def move(self, x: Tensor, tangent: Tensor) -> Tensor:
        """Sum, wrapped."""
        return wrap(x + tangent)

    def sample_prior(self, noise: Tensor) -> Tensor:
        """Uniform numbers: the normal distribution function of the noise."""
        return wrap(torch.special.ndtr(noise))

    def prior_log_density(self, x: Tensor, degrees: Tensor) -> Tensor:
        """0: the density of uniform fractional coordinates."""
        return torch.zeros_like(degrees, dtype=x.dtype)

    def score_scale(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """sqrt(E|score|²) of one coordinate, to rounding: 1/sigma while images are separate, by quadrature where they meet."""
        sigma = self.sigma(t)
        wide = sigma.double().clamp(min=_SEPARATE).unsqueeze(-1)
        grid = torch.arange(_QUADRATURE_POINTS, dtype=torch.float64, device=t.device) / _QUADRATURE_POINTS
        mean = (wrapped_normal_density(grid, wide) * wrapped_normal_score(grid, wide) ** 2).mean(-1)
        return torch.where(sigma < _SEPARATE, 1 / sigma, torch.sqrt(mean).to(sigma.dtype))


def wrapped_normal_density(difference: Tensor, sigma: Tensor) -> Tensor:
    """p(d) of coordinate differences for widths that broadcast against them; 1 on average."""
    d = _centred(difference)
    near, far = _split(sigma)
    direct = torch.exp(-0.5 * ((d.unsqueeze(-1) + _images(d)) / near.unsqueeze(-1)) ** 2).sum(-1)
    series = 1 + 2 * (_powers(far) * torch.cos(_angles(d))).sum(-1)
    return torch.where(sigma < _CROSSOVER, direct / (near * math.sqrt(2 * math.pi)), series)


def wrapped_normal_score(difference: Tensor, sigma: Tensor) -> Tensor:
    """d log p/dd of coordinate differences for widths that broadcast against them; odd, and 0 half a cell away."""
    d = _centred(difference)
    near, far = _split(sigma)
    shifted = d.unsqueeze(-1) + _images(d)
    weights = torch.softmax(-0.5 * (shifted / near.unsqueeze(-1)) ** 2, dim=-1)
    direct = -(weights * shifted).sum(-1) / near**2
    n, powers, angles = _harmonics(d), _powers(far), _angles(d)
    slope = -4 * math.pi * (n * powers * torch.sin(angles)).sum(-1)
    return torch.where(sigma < _CROSSOVER, direct, slope / (1 + 2 * (powers * torch.cos(angles)).sum(-1)))


def _centred(difference: Tensor) -> Tensor:
    return difference - torch.round(difference.detach())


def _split(sigma: Tensor) -> tuple[Tensor, Tensor]:
    # each sum is given widths it can take everywhere, so that the one not used cannot spoil a gradient
    return sigma.clamp(max=_CROSSOVER), sigma.clamp(min=_CROSSOVER)


def _images(like: Tensor) -> Tensor:
    return torch.arange(-_IMAGES, _IMAGES + 1, dtype=like.dtype, device=like.device)


def _harmonics(like: Tensor) -> Tensor:
    return torch.arange(1, _HARMONICS + 1, dtype=like.dtype, device=like.device)


def _angles(d: Tensor) -> Tensor:
    return 2 * math.pi * d.unsqueeze(-1) * _harmonics(d)


def _powers(sigma: Tensor) -> Tensor:
    return torch.exp(-2 * (math.pi * sigma.unsqueeze(-1) * _harmonics(sigma)) ** 2)
