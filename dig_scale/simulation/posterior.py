"""Means of clean structures given noised ones, from an energy alone: what denoising learns at a noise level, without data.

In: a Potential, noised structures y, their noise levels sigma, and structures to start from. Out: the mean of

    p(x | y) ∝ exp(-u(x) - |x - y|²/(2 sigma²)),

which by Tweedie's formula is y + sigma² times the score at y of the Boltzmann distribution with noise sigma. It is that of any
y whatever, so noised structures may come from anywhere; only x has to follow the energy, and the restraint to y makes that
quick as long as sigma spans no barrier (reverse diffusion Monte Carlo; Huang et al., ICLR 2024).

Langevin dynamics in units of kT and of the thermal velocity, so that a time is a length in Å: every coordinate has mass 1,
whatever its atom, which leaves the distribution as it is; the BAOAB splitting (Leimkuhler and Matthews 2013), whose error of
positions is small for stiff bonds; friction 1/sigma. Knows neither networks nor schedules nor engines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dig_scale.simulation.potential import Potential

STEPS_PER_NOISE = 4.0
"""The restraint is followed by at least so many steps per sigma, 25 in its period."""


@dataclass(frozen=True)
class Dynamics:
    """`step` in Å per step at thermal velocity; length in periods 2 pi sigma of the restraint, the later half averaged."""

    step: float = 0.01
    periods: int = 4


def posterior_means(
    potential: Potential,
    noised: np.ndarray,
    noise_std: np.ndarray,
    start: np.ndarray,
    dynamics: Dynamics,
    generator: np.random.Generator,
) -> np.ndarray:
    """Means [F, N, 3] Å of clean structures given noised ones [F, N, 3] at levels [F] Å, NaN where the dynamics left all numbers.

    Sites that are not mobile stay at `start`. A system without fixed sites moves as a whole, too: take its centre out.
    All rows take the steps of the longest; give rows of like noise levels together.
    """
    steps, size = steps_of(noise_std, dynamics)
    mobile = potential.system.mobile[:, None]
    restraint = _Restrained(potential, noised, noise_std[:, None, None] ** 2, mobile)
    h = size[:, None, None]
    keep = np.exp(-h / noise_std[:, None, None])
    spread = np.sqrt(1 - keep**2)
    x = start.astype(np.float64)
    v = generator.standard_normal(x.shape) * mobile
    total, push = np.zeros_like(x), restraint.force(x)
    with np.errstate(over="ignore", invalid="ignore"):
        for number in range(steps):
            v = v + 0.5 * h * push
            x = x + 0.5 * h * v
            v = keep * v + spread * generator.standard_normal(x.shape) * mobile
            x = x + 0.5 * h * v
            push = restraint.force(x)
            v = v + 0.5 * h * push
            if number >= steps // 2:
                total += x
    total[~np.isfinite(potential.energy_and_forces(x)[0])] = np.nan
    return total / (steps - steps // 2)


def steps_of(noise_std: np.ndarray, dynamics: Dynamics) -> tuple[int, np.ndarray]:
    """Steps of the longest dynamics, and the step [F] in Å of each."""
    size = np.minimum(dynamics.step, noise_std / STEPS_PER_NOISE)
    return max(2, math.ceil(float((2 * math.pi * dynamics.periods * noise_std / size).max()))), size


@dataclass(frozen=True)
class _Restrained:
    potential: Potential
    centre: np.ndarray
    variance: np.ndarray
    mobile: np.ndarray

    def force(self, x: np.ndarray) -> np.ndarray:
        """-grad of u + |x - centre|²/(2 variance), 1/Å; 0 of sites that do not move."""
        forces = self.potential.energy_and_forces(x)[1] / self.potential.kT_ev
        return np.where(self.mobile, forces - (x - self.centre) / self.variance, 0.0)


@dataclass(frozen=True)
class Part:
    """Noised structures [F, N, 3] Å at like levels [F] Å, where their dynamics start, and the seed of their random numbers."""

    noised: np.ndarray
    noise_std: np.ndarray
    start: np.ndarray
    seed: tuple[int, ...]


@dataclass(frozen=True)
class MeansOfPart:
    """posterior_means of a Part with a potential, wherever that is."""

    dynamics: Dynamics

    def __call__(self, potential: Potential, part: Part) -> np.ndarray:
        """[F, N, 3] Å."""
        generator = np.random.default_rng(part.seed)
        return posterior_means(potential, part.noised, part.noise_std, part.start, self.dynamics, generator)
