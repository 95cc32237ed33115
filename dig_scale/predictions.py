"""What a predictor says of a property of a noised structure: a Normal, or of a dihedral a von Mises distribution.

q(c | x_t) in units in which the property is of order 1: (c - centre)/spread with the centre and spread of the training
frames, so that an answer of zeros is the prior; of dihedrals c in rad, where zeros are the uniform distribution. Two
numbers of a network give either, and both tend to what the frames as a whole have where the noise leaves nothing to see.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dig_scale.batch import Context, Geometry

_LARGEST_LOG_VARIANCE = 12.0
"""Variances stay between e^-12 and e^12 squared spreads."""
_LARGEST_LOG_CONCENTRATION = 11.0
"""The narrowest von Mises distribution is 0.3 degrees wide."""
_TINY = 1e-12


class Family(enum.StrEnum):
    """The form of q(c | x_t)."""

    NORMAL = "normal"
    VON_MISES = "von-mises"


class Prediction(Protocol):
    """q(c | x_t) of B structures."""

    def log_density(self, value: Tensor) -> Tensor:
        """log q [B] of values [B], nat; differentiable in the structures."""
        ...

    def widened(self, spread: float) -> Prediction:
        """That of the property with an independent error of standard deviation `spread` added."""
        ...


PropertyPredictor = Callable[[Geometry, Context, Tensor], Prediction]
"""(noised structures [B] on the scale of the data, context, noise level [B] Å) -> q(c | x_t)."""


@dataclass(frozen=True)
class NormalPrediction:
    """mean [B] and variance [B]."""

    mean: Tensor
    variance: Tensor

    def log_density(self, value: Tensor) -> Tensor:
        """See Prediction."""
        return -0.5 * ((value - self.mean) ** 2 / self.variance + torch.log(2 * math.pi * self.variance))

    def widened(self, spread: float) -> NormalPrediction:
        """The variances add up."""
        return NormalPrediction(self.mean, self.variance + spread**2)


@dataclass(frozen=True)
class AnglePrediction:
    """The mean direction [B, 2] as (cos, sin) and the concentration kappa [B] of a von Mises distribution; values in rad."""

    direction: Tensor
    concentration: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean direction [B] in rad on [-pi, pi]."""
        return torch.atan2(self.direction[:, 1], self.direction[:, 0])

    def log_density(self, value: Tensor) -> Tensor:
        """See Prediction; kappa (cos(c - mean) - 1) is taken from the chord, which keeps its digits at large kappa."""
        chord = torch.stack([torch.cos(value), torch.sin(value)], dim=-1) - self.direction
        normaliser = torch.log(2 * math.pi * torch.special.i0e(self.concentration))
        return -0.5 * self.concentration * (chord**2).sum(-1) - normaliser

    def widened(self, spread: float) -> AnglePrediction:
        """1/kappa + spread², exact where both are narrow; a wide one becomes uniform a little early."""
        return AnglePrediction(self.direction, self.concentration / (1 + self.concentration * spread**2))


def prediction_from(family: Family, numbers: Tensor) -> NormalPrediction | AnglePrediction:
    """The distribution that two numbers [B, 2] of order 1 stand for: mean and log-variance, or a direction whose length is
    the logarithm of a concentration (asinh kappa)."""
    if family is Family.NORMAL:
        mean, log_variance = numbers.unbind(-1)
        return NormalPrediction(mean, torch.exp(_bounded(log_variance, _LARGEST_LOG_VARIANCE)))
    length = torch.sqrt((numbers**2).sum(-1) + _TINY)
    concentration = torch.sinh(_bounded(length, _LARGEST_LOG_CONCENTRATION))
    return AnglePrediction(numbers / length.unsqueeze(-1), concentration)


@dataclass(frozen=True)
class Predicted:
    """Which property a predictor tells, and how its values (Å, rad, a label's own unit) become numbers of order 1.

    `unit` is what one of the user's units (degrees of angles) is in those of the values.
    """

    property: str
    family: Family = Family.NORMAL
    centre: float = 0.0
    spread: float = 1.0
    unit: float = 1.0

    def wanted(self, target: float, spread: float) -> tuple[float, float]:
        """A wish in the user's units as value and spread of order 1."""
        return (target * self.unit - self.centre) / self.spread, spread * self.unit / self.spread


def _bounded(values: Tensor, limit: float) -> Tensor:
    return limit * torch.tanh(values / limit)
