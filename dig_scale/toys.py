"""Systems with exact answers: densities whose noised score and log-density are known, in closed form or by quadrature.

They serve as tests of every process, solver and estimator, and as sanity checks for users' own code; toy_states.py runs
them through the same machinery as molecules. All tensors are [B, D] (flattened coordinates, Å), energies in units of kT.
Noised means x_t = alpha x_0 + sigma noise with alpha, sigma [B].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from dig_scale.quadrature import Quadrature


class Toy(Protocol):
    """A density exp(-reduced_energy - log_z) of `dimension` coordinates with everything known."""

    @property
    def dimension(self) -> int:
        """Number of coordinates D."""
        ...

    @property
    def log_z(self) -> float:
        """Logarithm of the partition function, nat."""
        ...

    def reduced_energy(self, x: Tensor) -> Tensor:
        """u [B] in kT, differentiable."""
        ...

    def noised_log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p(x_t) [B]."""
        ...

    def noised_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """grad log p(x_t) [B, D], differentiable."""
        ...

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Clean samples [n, D]."""
        ...


@dataclass(frozen=True)
class GaussianMixture:
    """Mixture of isotropic Gaussians: means [K, D], std [K], weights [K] (summing to 1)."""

    means: Tensor
    std: Tensor
    weights: Tensor

    @property
    def dimension(self) -> int:
        """D."""
        return self.means.shape[1]

    @property
    def log_z(self) -> float:
        """0: the reduced energy is that of the normalised density."""
        return 0.0

    def reduced_energy(self, x: Tensor) -> Tensor:
        """-log p(x) [B]."""
        return -self.noised_log_density(x, x.new_ones(len(x)), x.new_zeros(len(x)))

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

    def tilted(self, slope: Tensor) -> GaussianMixture:
        """The density proportional to p(x) exp(slope·x), slope [D] in 1/Å: again a mixture."""
        gained = self.means @ slope + 0.5 * self.std**2 * (slope @ slope)
        weights = torch.softmax(torch.log(self.weights) + gained, dim=0)
        return GaussianMixture(self.means + self.std[:, None] ** 2 * slope, self.std, weights)

    def _terms(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance = alpha[:, None] ** 2 * self.std**2 + sigma[:, None] ** 2
        offset = x[:, None] - alpha[:, None, None] * self.means
        square = (offset**2).sum(-1)
        norm = 0.5 * x.shape[1] * torch.log(2 * math.pi * variance)
        return torch.log(self.weights) - 0.5 * square / variance - norm, offset, variance


@dataclass(frozen=True)
class DoubleWell:
    """u(x) = barrier ((x_0/width)² - 1)² + |x_rest|²/2, in kT: two equal minima at x_0 = ±width; exact by quadrature."""

    barrier: float
    width: float
    dimension: int = 1

    @property
    def log_z(self) -> float:
        """nat, by quadrature."""
        return self._first.log_z + 0.5 * (self.dimension - 1) * math.log(2 * math.pi)

    def reduced_energy(self, x: Tensor) -> Tensor:
        """[B]."""
        return self._energy(x[:, :1]) + 0.5 * (x[:, 1:] ** 2).sum(-1)

    def noised_log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p(x_t) [B]."""
        return self._first.noised_log_density(x[:, :1], alpha, sigma) + _normal_log_density(x[:, 1:], alpha, sigma)

    def noised_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """grad log p(x_t) [B, D]."""
        first = self._first.noised_score(x[:, :1], alpha, sigma)
        return torch.cat([first, _normal_score(x[:, 1:], alpha, sigma)], dim=1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Clean samples [n, D], fp64."""
        rest = torch.randn(n, self.dimension - 1, generator=generator, dtype=torch.float64)
        return torch.cat([self._first.sample(n, generator), rest], dim=1)

    def _energy(self, x: Tensor) -> Tensor:
        return self.barrier * ((x[:, 0] / self.width) ** 2 - 1) ** 2

    def _gradient(self, x: Tensor) -> Tensor:
        return 4 * self.barrier * ((x / self.width) ** 2 - 1) * x / self.width**2

    @cached_property
    def _first(self) -> Quadrature:
        # u = 50 is 1e-22 of the top; a well is about width/sqrt(8 barrier) wide
        reach = self.width * math.sqrt(1 + math.sqrt(50 / self.barrier))
        return Quadrature(
            self._energy, self._gradient, (-reach,), (reach,), 0.2 * self.width / math.sqrt(8 * self.barrier)
        )


_DEPTHS = (-200.0, -100.0, -170.0, 15.0)
_XX = (-1.0, -1.0, -6.5, 0.7)
_XY = (0.0, 0.0, 11.0, 0.6)
_YY = (-10.0, -10.0, -6.5, 0.7)
_X = (1.0, 0.0, -0.5, -1.0)
_Y = (0.0, 0.5, 1.5, 1.0)


@dataclass(frozen=True)
class MuellerBrown:
    """The two-dimensional potential of Müller and Brown (1979) with its own parameters, energies divided by `kT` (10 to 20 in
    its own units, where its depths are -146.7, -108.2 and -80.8); exact by quadrature."""

    kT: float

    @property
    def dimension(self) -> int:
        """2."""
        return 2

    @property
    def log_z(self) -> float:
        """nat, by quadrature."""
        return self._quadrature.log_z

    def reduced_energy(self, x: Tensor) -> Tensor:
        """V(x)/kT [B]."""
        return self._terms(x)[0].sum(-1) / self.kT

    def noised_log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p(x_t) [B]."""
        return self._quadrature.noised_log_density(x, alpha, sigma)

    def noised_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """grad log p(x_t) [B, 2]."""
        return self._quadrature.noised_score(x, alpha, sigma)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Clean samples [n, 2], fp64."""
        return self._quadrature.sample(n, generator)

    def _terms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The four terms [B, 4], and the offsets from their centres."""
        depth, xx, xy, yy, x0, y0 = (x.new_tensor(values) for values in (_DEPTHS, _XX, _XY, _YY, _X, _Y))
        dx, dy = x[:, :1] - x0, x[:, 1:2] - y0
        return depth * torch.exp(xx * dx**2 + xy * dx * dy + yy * dy**2), dx, dy

    def _gradient(self, x: Tensor) -> Tensor:
        terms, dx, dy = self._terms(x)
        xx, xy, yy = (x.new_tensor(values) for values in (_XX, _XY, _YY))
        along_x, along_y = terms * (2 * xx * dx + xy * dy), terms * (xy * dx + 2 * yy * dy)
        return torch.stack([along_x.sum(-1), along_y.sum(-1)], dim=-1) / self.kT

    @cached_property
    def _quadrature(self) -> Quadrature:
        # at kT = 20 the density is below 1e-20 of its top outside; the narrowest well is 0.07 wide at kT = 10
        spacing = 0.02 * math.sqrt(self.kT / 10)
        return Quadrature(self.reduced_energy, self._gradient, (-4.0, -2.0), (2.5, 4.0), spacing)


@dataclass(frozen=True)
class HarmonicCrystal:
    """u(x) = x·K·x/2 in kT with K [D, D] positive definite: Gaussian with covariance K^-1."""

    stiffness: Tensor

    @property
    def dimension(self) -> int:
        """D."""
        return self.stiffness.shape[0]

    @property
    def log_z(self) -> float:
        """nat."""
        return float(0.5 * self.dimension * math.log(2 * math.pi) - 0.5 * torch.logdet(self.stiffness))

    def reduced_energy(self, x: Tensor) -> Tensor:
        """[B]."""
        return 0.5 * torch.einsum("bi,ij,bj->b", x, self.stiffness, x)

    def log_density(self, x: Tensor) -> Tensor:
        """Normalised log-density [B]."""
        return -self.log_z - self.reduced_energy(x)

    def noised_log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p(x_t) [B]."""
        variance, along = self._modes(x, alpha, sigma)
        return -0.5 * (along**2 / variance + torch.log(2 * math.pi * variance)).sum(-1)

    def noised_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """grad log p(x_t) [B, D]."""
        variance, along = self._modes(x, alpha, sigma)
        return -(along / variance) @ self._eigen[1].to(x.dtype).mT

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Clean samples [n, D]."""
        stiffness, modes = self._eigen
        noise = torch.randn(n, self.dimension, generator=generator, dtype=self.stiffness.dtype)
        return (noise / stiffness.sqrt()) @ modes.mT

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.stiffness)
        return values, vectors

    def _modes(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Variances [B, D] of the normal modes at this noise, and x along them."""
        stiffness, modes = (part.to(x.dtype) for part in self._eigen)
        return alpha[:, None] ** 2 / stiffness + sigma[:, None] ** 2, x @ modes


@dataclass(frozen=True)
class WithNormals:
    """A toy with `extra` independent standard normals behind its own coordinates."""

    toy: Toy
    extra: int

    @property
    def dimension(self) -> int:
        """Own and extra coordinates."""
        return self.toy.dimension + self.extra

    @property
    def log_z(self) -> float:
        """nat."""
        return self.toy.log_z + 0.5 * self.extra * math.log(2 * math.pi)

    def reduced_energy(self, x: Tensor) -> Tensor:
        """[B]."""
        own, rest = self._parts(x)
        return self.toy.reduced_energy(own) + 0.5 * (rest**2).sum(-1)

    def noised_log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p(x_t) [B]."""
        own, rest = self._parts(x)
        return self.toy.noised_log_density(own, alpha, sigma) + _normal_log_density(rest, alpha, sigma)

    def noised_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """grad log p(x_t) [B, D]."""
        own, rest = self._parts(x)
        return torch.cat([self.toy.noised_score(own, alpha, sigma), _normal_score(rest, alpha, sigma)], dim=1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Clean samples [n, D]."""
        own = self.toy.sample(n, generator)
        return torch.cat([own, torch.randn(n, self.extra, generator=generator, dtype=own.dtype)], dim=1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : self.toy.dimension], x[:, self.toy.dimension :]


def _normal_log_density(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    variance = (alpha**2 + sigma**2).unsqueeze(-1)
    return -0.5 * (x**2 / variance + torch.log(2 * math.pi * variance)).sum(-1)


def _normal_score(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return -x / (alpha**2 + sigma**2).unsqueeze(-1)
