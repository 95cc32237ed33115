"""Toys on curved spaces with everything known: mixtures on SO(3) and on the torus, as systems of one site.

    toy = rotation_mixture(centres, widths, weights)      # or wrapped_mixture(...)
    s = toy.score_fn(state, toy.context, t)               # exact at every noise
    toy.log_density(state, t)                             # exact, at the noise of t; the clean one is t = None

IGSO(3) about a centre stays one under the process, with eps² added, and so does a wrapped normal, with sigma² added.
Density against the Haar measure of mass 1, or Lebesgue on the unit torus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dig_scale.batch import Context, Score, ScoreFn, State
from dig_scale.config import Diffusion
from dig_scale.diffusion import rotation
from dig_scale.diffusion.composition import Composition, Field
from dig_scale.diffusion.parametrisation import CellCoordinates, ScaledScore
from dig_scale.diffusion.periodic import WrappedNormal, wrapped_normal_density, wrapped_normal_score
from dig_scale.diffusion.rotation import RotationProcess
from dig_scale.geometry import rotations
from dig_scale.toy_states import anchored_context

_SMALLEST = 1e-9


@dataclass(frozen=True)
class CurvedToy:
    """A density on a curved space: log_density(state, t [B] or None) -> [B] nat, and sample(n, generator) -> State, fp64."""

    composition: Composition
    context: Context
    score_fn: ScoreFn
    log_density: Callable[[State, Tensor | None], Tensor]
    sample: Callable[[int, torch.Generator], State]


def rotation_mixture(
    centres: Tensor, widths: Tensor, weights: Tensor, process: RotationProcess = RotationProcess()
) -> CurvedToy:
    """IGSO(3) of widths [K] (its eps) about centres [K, 3, 3] with weights [K], for one rotation."""

    def terms(state: State, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert state.rotations is not None
        noise = widths.new_zeros(1) if t is None else process.eps(t.to(widths))
        eps = torch.sqrt(noise[:, None] ** 2 + widths**2)
        tangent = rotations.log(centres.mT @ state.rotations.to(widths))
        # a length of exactly 0 has no derivative
        angle = torch.sqrt((tangent**2).sum(-1) + _SMALLEST**2)
        return rotation.log_density(angle, eps) + torch.log(weights), tangent, rotation.score(angle, eps) / angle

    def score_fn(state: State, context: Context, t: Tensor) -> Score:
        assert state.rotations is not None
        logs, tangent, slope = terms(state, t)
        share = torch.softmax(logs, dim=1) * slope
        return Score(rotations=(share.unsqueeze(-1) * tangent).sum(1, keepdim=True).to(state.rotations.dtype))

    def sample(n: int, generator: torch.Generator) -> State:
        component = torch.multinomial(weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, 1, 3, generator=generator, dtype=widths.dtype)
        return State(rotations=centres[component, None] @ rotation.sample(widths[component], noise))

    def log_density(state: State, t: Tensor | None) -> Tensor:
        return torch.logsumexp(terms(state, t)[0], dim=1)

    return CurvedToy(_alone("rotations", process), anchored_context(1), score_fn, log_density, sample)


def wrapped_mixture(
    centres: Tensor, widths: Tensor, weights: Tensor, process: WrappedNormal | None = None
) -> CurvedToy:
    """Wrapped normals of widths [K] about centres [K, 3] (fractions of a cell) with weights [K], for one site."""
    default = Diffusion()
    noise = process or WrappedNormal(default.fractional_noise_min, default.fractional_noise_max)

    def terms(state: State, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert state.fractional is not None
        apart = state.fractional.to(widths) - centres
        level = widths.new_zeros(1) if t is None else noise.sigma(t.to(widths))
        sigma = torch.sqrt(level[:, None] ** 2 + widths**2).unsqueeze(-1)
        return torch.log(wrapped_normal_density(apart, sigma)).sum(-1) + torch.log(weights), apart, sigma

    def score_fn(state: State, context: Context, t: Tensor) -> Score:
        assert state.fractional is not None
        logs, apart, sigma = terms(state, t)
        share = torch.softmax(logs, dim=1).unsqueeze(-1) * wrapped_normal_score(apart, sigma)
        return Score(fractional=share.sum(1, keepdim=True).to(state.fractional.dtype))

    def sample(n: int, generator: torch.Generator) -> State:
        component = torch.multinomial(weights, n, replacement=True, generator=generator)
        shift = widths[component, None] * torch.randn(n, 3, generator=generator, dtype=widths.dtype)
        return State(fractional=torch.remainder(centres[component] + shift, 1.0).unsqueeze(1))

    def log_density(state: State, t: Tensor | None) -> Tensor:
        return torch.logsumexp(terms(state, t)[0], dim=1)

    return CurvedToy(_alone("fractional", noise), anchored_context(1), score_fn, log_density, sample)


def _alone(name: str, process: RotationProcess | WrappedNormal) -> Composition:
    return Composition({name: Field(process, ScaledScore(process.score_scale))}, (), CellCoordinates(10.0, 0.2))
