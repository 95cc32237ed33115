"""Paths between two states through the prior (Zheng et al. 2023): encode both by the ODE, interpolate, decode.

In: two clean states of one system (rows of a State), a score function. Out: the states along the way, whose ends are the
two again, to the error of the ODE. Between latents the way is
vectors     (positions, lattice) along a great circle (SPHERICAL), since the middle of two Gaussian samples is too short for one,
            or straight (LINEAR), as published
rotations   along the geodesic R_A (R_A^T R_B)^eta, which is (R_B R_A^-1)^eta R_A
fractional  the shorter way round the torus, coordinate by coordinate.
Free molecules are to be superposed beforehand (`superposed`): their orientation is a coordinate like any other. A path is
what the model finds likely between the two, not a trajectory: frames are not equally far apart in time.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dig_scale.batch import Context, ScoreFn, State, fields_of
from dig_scale.diffusion.composition import Composition
from dig_scale.errors import UserError
from dig_scale.geometry import rotations
from dig_scale.geometry.alignment import kabsch
from dig_scale.geometry.lattice import wrap
from dig_scale.sampling.flow import Integration, from_latent, to_latent

_SAME_DIRECTION = 1e-6
"""rad; below it a great circle is straight."""


class Way(enum.StrEnum):
    """How vectors are interpolated."""

    SPHERICAL = "spherical"
    LINEAR = "linear"


@dataclass(frozen=True)
class PathSettings:
    """Number of frames, ends included, the way between latents, and how the ODE is integrated."""

    frames: int = 21
    way: Way = Way.SPHERICAL
    integration: Integration = field(default_factory=Integration)

    def __post_init__(self) -> None:
        if self.frames < 2:
            raise UserError(f"a path of {self.frames} frames: expected 2 or more, the two ends among them")


def pathway(
    score_fn: ScoreFn, composition: Composition, ends: State, context: Context, settings: PathSettings = PathSettings()
) -> State:
    """The clean states [frames] from the first to the second row of `ends`; raises UserError where it has not two."""
    rows = {len(value) for value in fields_of(ends).values()}
    if rows != {2}:
        raise UserError(f"a path has two ends; found states with {sorted(rows)} rows")
    latent = to_latent(score_fn, composition, ends, context, settings.integration)
    between = interpolated(latent, settings.frames, settings.way)
    return from_latent(score_fn, composition, between, context, settings.integration)


def interpolated(ends: State, frames: int, way: Way) -> State:
    """States [frames] from the first to the second row of `ends`, evenly spaced along the way of every field."""
    found = {}
    for name, value in fields_of(ends).items():
        fraction = torch.linspace(0, 1, frames, dtype=value.dtype, device=value.device)
        first, second = value[:1], value[1:]
        if name == "rotations":
            found[name] = _geodesic(first, second, fraction)
        elif name == "fractional":
            apart = second - first
            found[name] = wrap(first + fraction[:, None, None] * (apart - torch.round(apart)))
        elif way is Way.LINEAR:
            found[name] = torch.lerp(first, second, _shaped(fraction, first))
        else:
            found[name] = _great_circle(first, second, fraction)
    return State(**found)


def superposed(arrays: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
    """Stored frames [2, ...] with the second laid on the first, frames of residues turned along.

    Only where the system is free to move as a whole; anchored ones, and crystals, stay as they are.
    """
    found = dict(arrays)
    if not bool(context.free.all()) or "cell" in arrays:
        return found
    x, there = arrays["positions"], context.present[0].cpu().numpy()
    first, second = x.detach().cpu().double().numpy()
    rotation, _ = kabsch(second, first, there.astype(np.float64))
    turn = torch.as_tensor(rotation).to(x)
    weight = context.present[0].to(x).unsqueeze(-1)
    centres = (x * weight).sum(1, keepdim=True) / weight.sum()
    found["positions"] = torch.stack([x[0], (x[1] - centres[1]) @ turn.mT + centres[0]])
    if "rotations" in arrays:
        found["rotations"] = torch.stack([arrays["rotations"][0], turn @ arrays["rotations"][1]])
    return found


def _geodesic(first: Tensor, second: Tensor, fraction: Tensor) -> Tensor:
    return first @ rotations.exp(fraction[:, None, None] * rotations.log(first.mT @ second))


def _great_circle(first: Tensor, second: Tensor, fraction: Tensor) -> Tensor:
    """Directions turn evenly, lengths change evenly: vectors of one length keep it."""
    a, b = first.flatten(1), second.flatten(1)
    lengths = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    if float(lengths[0]) == 0 or float(lengths[1]) == 0:
        return torch.lerp(first, second, _shaped(fraction, first))
    u, v = a / lengths[0], b / lengths[1]
    # accurate near 0 and near pi, where the cosine is not
    angle = 2 * torch.atan2((u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True))
    eta = fraction.unsqueeze(-1)
    if float(angle) < _SAME_DIRECTION:
        direction = torch.lerp(u, v, eta)
    else:
        direction = (torch.sin((1 - eta) * angle) * u + torch.sin(eta * angle) * v) / torch.sin(angle)
    length = torch.lerp(*lengths, eta)
    return (length * direction).view(-1, *first.shape[1:])


def _shaped(fraction: Tensor, like: Tensor) -> Tensor:
    return fraction.view(-1, *([1] * (like.dim() - 1)))
