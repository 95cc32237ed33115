"""Variance-preserving noise schedules: alpha(t), sigma(t) with alpha² + sigma² = 1, t in [0, 1], t = 0 the data end.

Positions are in Å with a standard-normal prior of 1 Å, as in DiG, so sigma/alpha is the noise in Å on unscaled data
(`noise_std`). `DigSigmoid` is DiG's discrete schedule (Zheng et al. 2023, beta_k = sigmoid(x_k)(beta_end - beta_start) +
beta_start) joined by linear interpolation of the log-SNR; `LogLinear` and `Power` are continuous-time schedules given by
noise_std(t), log-linear or as in Karras et al. 2022 eq. 5. Knows nothing of networks or states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from dig_scale.config import Diffusion


class Schedule(Protocol):
    """noise_std(t) [Å] = sigma/alpha, increasing in t; everything else follows from it."""

    def noise_std(self, t: Tensor) -> Tensor:
        """sigma/alpha in Å at t, same shape."""
        ...

    def time_of(self, noise_std: Tensor) -> Tensor:
        """Inverse of noise_std."""
        ...

    def log_rate(self, t: Tensor) -> Tensor:
        """d log(noise_std)/dt at t, same shape."""
        ...


@dataclass(frozen=True)
class LogLinear:
    """log noise_std linear in t between noise_min and noise_max (Å)."""

    noise_min: float
    noise_max: float

    def noise_std(self, t: Tensor) -> Tensor:
        """Å."""
        return self.noise_min * (self.noise_max / self.noise_min) ** t

    def time_of(self, noise_std: Tensor) -> Tensor:
        """t in [0, 1]."""
        return torch.log(noise_std / self.noise_min) / math.log(self.noise_max / self.noise_min)

    def log_rate(self, t: Tensor) -> Tensor:
        """log(noise_max/noise_min), constant."""
        return torch.full_like(t, math.log(self.noise_max / self.noise_min))


@dataclass(frozen=True)
class Power:
    """noise_std^(1/power) linear in t between noise_min and noise_max (Å)."""

    noise_min: float
    noise_max: float
    power: float

    def noise_std(self, t: Tensor) -> Tensor:
        """Å."""
        low, high = self.noise_min ** (1 / self.power), self.noise_max ** (1 / self.power)
        return (low + t * (high - low)) ** self.power

    def time_of(self, noise_std: Tensor) -> Tensor:
        """t in [0, 1]."""
        low, high = self.noise_min ** (1 / self.power), self.noise_max ** (1 / self.power)
        return (noise_std ** (1 / self.power) - low) / (high - low)

    def log_rate(self, t: Tensor) -> Tensor:
        """power (high - low)/(low + t (high - low))."""
        low, high = self.noise_min ** (1 / self.power), self.noise_max ** (1 / self.power)
        return self.power * (high - low) / (low + t * (high - low))


@dataclass(frozen=True)
class DigSigmoid:
    """DiG's discrete schedule of `steps` betas; t = k / (steps - 1) is its step k."""

    steps: int
    beta_start: float
    beta_end: float

    @cached_property
    def betas(self) -> Tensor:
        """beta_k [steps], float64."""
        x = torch.linspace(-6, 6, self.steps, dtype=torch.float64)
        return torch.sigmoid(x) * (self.beta_end - self.beta_start) + self.beta_start

    @cached_property
    def alpha_bar(self) -> Tensor:
        """prod(1 - beta) [steps], float64: the square of alpha."""
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def _log_noise(self) -> Tensor:
        return 0.5 * (torch.log1p(-self.alpha_bar) - torch.log(self.alpha_bar))

    def noise_std(self, t: Tensor) -> Tensor:
        """Å."""
        place = t.double().clamp(0, 1) * (self.steps - 1)
        low = place.floor().long().clamp(max=self.steps - 2)
        table = self._log_noise.to(t.device)
        return torch.exp(torch.lerp(table[low], table[low + 1], place - low)).to(t.dtype)

    def time_of(self, noise_std: Tensor) -> Tensor:
        """t in [0, 1]; values outside the schedule's range are clipped to it."""
        table = self._log_noise.to(noise_std.device)
        wanted = torch.log(noise_std.double()).clamp(float(table[0]), float(table[-1]))
        high = torch.searchsorted(table, wanted.contiguous()).clamp(1, self.steps - 1)
        fraction = (wanted - table[high - 1]) / (table[high] - table[high - 1])
        return ((high - 1 + fraction) / (self.steps - 1)).to(noise_std.dtype)

    def log_rate(self, t: Tensor) -> Tensor:
        """Slope of the piece that t lies in."""
        low = (t.double().clamp(0, 1) * (self.steps - 1)).floor().long().clamp(max=self.steps - 2)
        table = self._log_noise.to(t.device)
        return ((table[low + 1] - table[low]) * (self.steps - 1)).to(t.dtype)


def schedule_from(config: Diffusion) -> Schedule:
    """The schedule that a recipe names."""
    if config.schedule == "dig-sigmoid":
        return DigSigmoid(config.steps, config.beta_start, config.beta_end)
    if config.schedule == "log-linear":
        return LogLinear(config.noise_min, config.noise_max)
    return Power(config.noise_min, config.noise_max, config.power)


def alpha_sigma(noise_std: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma with sigma/alpha = noise_std and alpha² + sigma² = 1."""
    alpha = torch.rsqrt(1 + noise_std**2)
    return alpha, noise_std * alpha
