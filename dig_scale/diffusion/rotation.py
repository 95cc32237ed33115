"""IGSO(3), Brownian motion on rotations, and the process that diffuses residue frames with it.

Notation of DiG (Zheng et al. 2023) and DiffDock (Corso et al. 2023): density against the Haar measure of mass 1,
f(w, e) = sum_l (2l+1) exp(-l(l+1) e^2) sin((l+1/2) w)/sin(w/2), w the angle in rad, e = `eps`. The exponent has no 1/2, so a
small rotation has variance 2 e^2 per axis; angles alone have the density f (1 - cos w)/pi. E[tr R] = 3 exp(-2 e^2).
For large e the series is summed; for small e its Poisson resummation over w + 2 pi n (Nikolayev and Savyolov 1970), both
to rounding and in float64, whatever the dtype of the arguments. Tangents are axis-angles in the local frame (rad):
R_t = R_0 exp(v). Knows neither networks nor chains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dig_scale.diffusion.process import Coefficients
from dig_scale.geometry import rotations

UNIFORM_EPS = 5.0
"""From here on f = 1 to 1e-20."""

_SERIES_FROM = 0.5
_SERIES_TERMS = 9
_SMALLEST_ANGLE = 1e-4
_REACH = 9.0
_CELLS = 256
_POLISHING_STEPS = 3


def log_density(omega: Tensor, eps: Tensor) -> Tensor:
    """log f (nat, against Haar) at angles omega in [0, pi], eps > 0; broadcast against each other."""
    angle, variance = omega.double(), eps.double() ** 2
    series = torch.log(_series(angle, variance.clamp(min=_SERIES_FROM)))
    images = _log_images(angle.clamp(min=_SMALLEST_ANGLE**2), variance.clamp(max=_SERIES_FROM))
    return torch.where(variance >= _SERIES_FROM, series, images).to(omega.dtype)


def density(omega: Tensor, eps: Tensor) -> Tensor:
    """f (against Haar) at angles omega in [0, pi], eps > 0; broadcast against each other."""
    return torch.exp(log_density(omega.double(), eps)).to(omega.dtype)


def score(omega: Tensor, eps: Tensor) -> Tensor:
    """d log f/d omega (1/rad) at angles omega in [0, pi], eps > 0; broadcast against each other."""
    return (omega.double() * _score_over_angle(omega, eps)).to(omega.dtype)


def _score_over_angle(omega: Tensor, eps: Tensor) -> Tensor:
    """score/omega in float64: finite, and constant below the smallest angle (true to 1e-8)."""
    angle, variance = omega.double().clamp(min=_SMALLEST_ANGLE), eps.double() ** 2
    wide = variance.clamp(min=_SERIES_FROM)
    series = _series_slope(angle, wide) / _series(angle, wide)
    images = _images_slope(angle, variance.clamp(max=_SERIES_FROM))
    return torch.where(variance >= _SERIES_FROM, series, images) / angle


def angle_density(omega: Tensor, eps: Tensor) -> Tensor:
    """Probability density (1/rad) of the angle alone, f (1 - cos omega)/pi."""
    return (2 * torch.sin(omega.double() / 2) ** 2 * density(omega.double(), eps) / math.pi).to(omega.dtype)


def _series(angle: Tensor, variance: Tensor) -> Tensor:
    """f. As sin((l+1/2)w)/sin(w/2) = 1 + 2 sum_{m<=l} cos(m w), it is a cosine series, summed by Clenshaw's rule."""
    coefficients = _cosine_coefficients(variance)
    twice = 2 * torch.cos(angle)
    ahead, after = torch.zeros_like(twice), torch.zeros_like(twice)
    for m in range(_SERIES_TERMS, 0, -1):
        ahead, after = coefficients[m] + twice * ahead - after, ahead
    return coefficients[0] + twice * ahead - 2 * after


def _series_slope(angle: Tensor, variance: Tensor) -> Tensor:
    """df/dw = -2 sum_m m C_m sin(m w)."""
    coefficients = _cosine_coefficients(variance)
    twice = 2 * torch.cos(angle)
    ahead, after = torch.zeros_like(twice), torch.zeros_like(twice)
    for m in range(_SERIES_TERMS, 0, -1):
        ahead, after = m * coefficients[m] + twice * ahead - after, ahead
    return -2 * torch.sin(angle) * ahead


def _cosine_coefficients(variance: Tensor) -> list[Tensor]:
    """C_m = sum_{l>=m} (2l+1) exp(-l(l+1) e^2), f = C_0 + 2 sum_m C_m cos(m w)."""
    found = [torch.zeros_like(variance)]
    for term in range(_SERIES_TERMS, -1, -1):
        found.append(found[-1] + (2 * term + 1) * torch.exp(-term * (term + 1) * variance))
    return found[:0:-1]


def _images(angle: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """S = sum_n (-1)^n (w - 2 pi n) exp(-((w - 2 pi n)^2 - w^2)/(4 e^2)) over n = -1, 0, 1, and dS/dw."""
    value, slope = angle, torch.ones_like(angle)
    for n in (-1, 1):
        shifted = angle - 2 * math.pi * n
        weight = -torch.exp(-math.pi * n * (math.pi * n - angle) / variance)
        value = value + weight * shifted
        slope = slope + weight * (1 + shifted * math.pi * n / variance)
    return value, slope


def _log_images(angle: Tensor, variance: Tensor) -> Tensor:
    """log f = e^2/4 - w^2/(4 e^2) + log(sqrt(pi) S/(2 e^3 sin(w/2)))."""
    prefactor = 0.5 * math.log(math.pi) - math.log(2.0) - 1.5 * torch.log(variance)
    ratio = torch.log(_images(angle, variance)[0]) - torch.log(torch.sin(angle / 2))
    return variance / 4 - angle**2 / (4 * variance) + prefactor + ratio


def _images_slope(angle: Tensor, variance: Tensor) -> Tensor:
    value, slope = _images(angle, variance)
    # 1/w is taken out of both terms, which cancel at small w.
    ratio = (slope - value / angle) / value
    return -angle / (2 * variance) + ratio + _cotangent_remainder(angle)


def _cotangent_remainder(angle: Tensor) -> Tensor:
    """1/w - cot(w/2)/2, by its series where the terms cancel."""
    series = angle / 12 + angle**3 / 720 + angle**5 / 30240 + angle**7 / 1209600
    large = angle.clamp(min=0.1)
    return torch.where(angle < 0.1, series, 1 / large - 0.5 / torch.tan(large / 2))


def score_norm(eps: Tensor) -> Tensor:
    """sqrt(E[score^2]/pi) at eps of any shape: the scale of DiG's rotation output, exact (DiG's own table is coarser)."""
    scale = eps.double().unsqueeze(-1)
    nodes, weights = _gauss_legendre(128)
    reach = (math.sqrt(2.0) * _REACH * scale).clamp(max=math.pi)
    angle = reach * nodes.to(eps.device)
    mass = angle_density(angle, scale) * weights.to(eps.device) * reach
    return ((score(angle, scale) ** 2 * mass).sum(-1) / math.pi).sqrt().to(eps.dtype)


def dig_score_norm(eps: Tensor) -> Tensor:
    """The score norm as the published DiG code looks it up: nearest of 1,000 table rows, with its index rule."""
    low, high = math.log10(0.01), math.log10(2.0)
    index = torch.round((torch.log10(eps.double()) - low) / (high - low) * 1000).long().clamp(0, 999)
    return _dig_table().to(eps.device)[index].to(eps.dtype)


@lru_cache(maxsize=1)
def _dig_table() -> Tensor:
    """[1000] score norms by DiG's sums over 2,000 angles."""
    eps = 10 ** torch.linspace(math.log10(0.01), math.log10(2.0), 1000, dtype=torch.float64)
    angles = torch.linspace(0, math.pi, 2001, dtype=torch.float64)[1:]
    rows = []
    for block in eps.split(50):
        pdf, values = angle_density(angles, block[:, None]), score(angles, block[:, None])
        rows.append(((values**2 * pdf).sum(-1) / pdf.sum(-1) / math.pi).sqrt())
    return torch.cat(rows)


@lru_cache(maxsize=4)
def _gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights [count] on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


@torch.no_grad()
def angle_quantile(radius: Float[Tensor, "B ..."], eps: Float[Tensor, " B"]) -> Float[Tensor, "B ..."]:
    """The angle (rad) below which a sample lies as often as three standard normals lie within `radius`.

    Increasing in radius, and sqrt(2) eps radius for small eps. Solved to 1e-9 of the width; carries no gradient.
    """
    distance = radius.double().flatten(1)
    wanted = torch.special.gammainc(distance.new_tensor(1.5), distance**2 / 2)
    scale = eps.double().unsqueeze(-1)
    width = (math.sqrt(2.0) * _REACH * scale).clamp(max=math.pi) / _CELLS
    edges = width * torch.arange(_CELLS + 1, dtype=torch.float64, device=radius.device)
    masses = _mass(edges[:, :-1], width, scale)
    below = torch.cat([torch.zeros_like(width), masses.cumsum(-1)], dim=-1)
    cell = (torch.searchsorted(below, wanted, right=True) - 1).clamp(0, _CELLS - 1)
    start, base, top = edges.gather(1, cell), below.gather(1, cell), below.gather(1, cell + 1)
    roots = [values.clamp(min=0) ** (1 / 3) for values in (base, wanted, top)]
    step = width * ((roots[1] - roots[0]) / (roots[2] - roots[0]).clamp(min=1e-300)).clamp(0, 1)
    for _ in range(_POLISHING_STEPS):
        missing = wanted - base - _mass(start, step, scale)
        change = missing / angle_density(start + step, scale).clamp(min=1e-300)
        step = torch.minimum((step + change).clamp(min=0), width)
    return (start + step).reshape(radius.shape).to(radius.dtype)


def _mass(start: Tensor, width: Tensor, eps: Tensor) -> Tensor:
    """Probability of angles in [start, start + width]."""
    nodes, weights = _gauss_legendre(5)
    total = torch.zeros_like(start * width)
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        total = total + weight * width * angle_density(start + node * width, eps)
    return total


def sample(eps: Float[Tensor, " B"], noise: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 3 3"]:
    """Rotations of IGSO(3) as a function of standard normals: their direction, at the angle that matches their length."""
    return rotations.exp(_tangent(eps, noise))


def _tangent(eps: Tensor, noise: Tensor) -> Tensor:
    radius = noise.norm(dim=-1)
    angle = angle_quantile(radius, eps)
    return noise * (angle / radius.clamp(min=torch.finfo(noise.dtype).tiny)).unsqueeze(-1)


@dataclass(frozen=True)
class RotationProcess:
    """IGSO(3) on residue frames with eps(t) = eps_min^(1-t) eps_max^t; defaults are DiG's. Values are [B, N, 3, 3].

    Densities and scores are against the Haar measure of mass 1, tangents local axis-angles in rad.
    """

    eps_min: float = 0.02
    eps_max: float = 1.65

    def eps(self, t: Tensor) -> Tensor:
        """IGSO(3)'s parameter at t."""
        return self.eps_min * (self.eps_max / self.eps_min) ** t

    def variance(self, t: Tensor) -> Tensor:
        """2 eps^2 in rad^2 per axis, the time of the Brownian motion."""
        return 2 * self.eps(t) ** 2

    def score_scale(self, t: Tensor) -> Tensor:
        """score_norm(eps(t))."""
        return score_norm(self.eps(t))

    def perturb(self, r0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """r0 @ exp(v), v of IGSO(3) from standard normals [B, N, 3]."""
        return r0 @ sample(self.eps(t), noise).to(r0.dtype)

    def target(self, r0: Tensor, rt: Tensor, t: Tensor) -> Tensor:
        """Conditional score [B, N, 3] as a local tangent at rt, 1/rad."""
        tangent = rotations.log(r0.mT.double() @ rt.double())
        slope = _score_over_angle(tangent.norm(dim=-1), self.eps(t.double()).unsqueeze(-1))
        return (slope.unsqueeze(-1) * tangent).to(rt.dtype)

    def coefficients(self, t: Tensor) -> Coefficients:
        """sigma is the standard deviation per axis, sqrt(2) eps, in rad; diffusion is d(2 eps^2)/dt."""
        variance = self.variance(t)
        return Coefficients(
            alpha=torch.ones_like(t),
            sigma=variance.sqrt(),
            drift=torch.zeros_like(t),
            diffusion=2 * variance * math.log(self.eps_max / self.eps_min),
        )

    def move(self, x: Tensor, tangent: Tensor) -> Tensor:
        """x @ exp(tangent)."""
        return x @ rotations.exp(tangent)

    def sample_prior(self, noise: Tensor) -> Tensor:
        """Uniform rotations from standard normals [B, N, 3]."""
        return sample(noise.new_full(noise.shape[:1], UNIFORM_EPS), noise)

    def prior_log_density(self, x: Tensor, degrees: Tensor) -> Tensor:
        """log density [B] of the uniform prior against the Haar measure: 0 whatever the degrees of freedom."""
        return torch.zeros_like(degrees, dtype=x.dtype)
