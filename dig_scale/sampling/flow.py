"""The probability-flow ODE between clean states (t = 0) and the prior (t = 1): encode, decode, and what log-densities need.

    plain vectors (positions, lattice)   dx/dt = drift x - 1/2 diffusion s
    rotations, fractional                dx/dt = tangent -1/2 diffusion s, at x in the sense of Process.move
(Song et al. 2021, eq. 13; De Bortoli et al. 2022 for manifolds.) Clean states are on the scale of the data, y = x_t/alpha at
t = 0, as samplers give them; immobile sites keep theirs. Integrated by torchdiffeq in float64 whatever the dtype of the
state, which is what the score function is called with.

A rotation is integrated as its nine numbers, dR/dt = R hat(w), and the score is always asked at the nearest rotation, to
which the end is brought too: the field so extended off the manifold is smooth, so every solver keeps its order, and
adaptive ones their error estimate, which a step by the exponential map would need solvers of its own for. Fractional
coordinates are integrated unwrapped; the score is asked at the wrapped ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchdiffeq import odeint

from dig_scale.batch import Context, ScoreFn, State, fields_of
from dig_scale.diffusion.composition import Composition
from dig_scale.diffusion.euclidean import VariancePreserving
from dig_scale.errors import UserError
from dig_scale.geometry.lattice import wrap
from dig_scale.geometry.rotations import nearest_rotations

Values = Mapping[str, Tensor]
"""The fields of a state by name, float64; rotations [B, N, 3, 3]."""

Slope = Callable[[Tensor, Values, Tensor], tuple[Values, Tensor]]
"""(t scalar, values, extra [B, K]) -> time derivatives of both."""

_METHODS = {"dopri5": "dopri5", "rk4": "rk4", "heun": "heun2"}


@dataclass(frozen=True)
class Integration:
    """How the ODE is integrated: `dopri5` adapts its steps to rtol and atol (per row of the batch: Å, rad), `rk4` and
    `heun` take `steps` equal ones in t.

    A discrete schedule (dig-sigmoid) has a kink at every step, where adaptive steps are spent: give it fixed ones.
    """

    method: Literal["dopri5", "rk4", "heun"] = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int = 100

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise UserError(f"unknown method {self.method!r} of integration; expected one of {', '.join(_METHODS)}")
        if self.steps < 1 or min(self.rtol, self.atol) <= 0:
            raise UserError(f"integration needs steps >= 1 and positive rtol and atol; found {self}")


def to_latent(
    score_fn: ScoreFn,
    composition: Composition,
    state: State,
    context: Context,
    integration: Integration = Integration(),
) -> State:
    """The state at t = 1 that the ODE carries a clean one to; gradients do not pass."""
    values = starting_values(composition, state)
    slope = _without_extra(score_fn, composition, context, state)
    return on_manifold(integrate(slope, values, _nothing(values), 0.0, 1.0, integration)[0], state)


def from_latent(
    score_fn: ScoreFn,
    composition: Composition,
    latent: State,
    context: Context,
    integration: Integration = Integration(),
) -> State:
    """The clean state that the ODE carries a state at t = 1 to: inverse of to_latent."""
    values = {name: value.double() for name, value in fields_of(latent).items()}
    slope = _without_extra(score_fn, composition, context, latent)
    ended = integrate(slope, values, _nothing(values), 1.0, 0.0, integration)[0]
    return on_manifold({name: value / clean_scale(composition, name) for name, value in ended.items()}, latent)


def starting_values(composition: Composition, state: State) -> Values:
    """x at t = 0 of a clean state y: alpha(0) y for plain vectors, y itself for the others."""
    return {name: value.double() * clean_scale(composition, name) for name, value in fields_of(state).items()}


def clean_scale(composition: Composition, name: str) -> float:
    """alpha of a field at t = 0."""
    return float(composition.fields[name].process.coefficients(torch.zeros(1, dtype=torch.float64)).alpha)


def tangents(
    score_fn: ScoreFn, composition: Composition, context: Context, state: State, t: Tensor
) -> dict[str, Tensor]:
    """-1/2 diffusion s [B, ...] by field, restricted to what may move, at t scalar; differentiable in the state."""
    rows = len(next(iter(fields_of(state).values())))
    time = t.to(next(iter(fields_of(state).values())).dtype).expand(rows)
    scores = State(**fields_of(score_fn(state, context, time)))
    found = fields_of(composition.constrained(scores, context))
    return {
        name: -0.5 * composition.fields[name].process.coefficients(t.double()).diffusion.to(found[name]) * found[name]
        for name in composition.fields
    }


def derivatives(composition: Composition, values: Values, tangent: Values, t: Tensor) -> dict[str, Tensor]:
    """Time derivatives of the values that are integrated, given the tangents of the score at t scalar."""
    found = {}
    for name, value in values.items():
        along = tangent[name].to(value.dtype)
        if name == "rotations":
            # rows of R hat(w) are the cross products of R's rows with w
            found[name] = torch.linalg.cross(value, along.unsqueeze(-2).expand_as(value))
        elif is_plain(composition, name):
            found[name] = composition.fields[name].process.coefficients(t.double()).drift * value + along
        else:
            found[name] = along
    return found


def is_plain(composition: Composition, name: str) -> bool:
    """Whether a field is a plain vector, with alpha < 1 and a drift."""
    return isinstance(composition.fields[name].process, VariancePreserving)


def on_manifold(values: Values, like: State) -> State:
    """The values as a state of the dtypes of `like`, rotations made orthogonal and fractional coordinates wrapped."""
    found = {}
    for name, reference in fields_of(like).items():
        value = values[name]
        if name == "rotations":
            value = nearest_rotations(value)
        elif name == "fractional":
            value = wrap(value)
        found[name] = value.to(reference.dtype)
    return State(**found)


def integrate(
    slope: Slope, values: Values, extra: Tensor, start: float, end: float, integration: Integration
) -> tuple[Values, Tensor]:
    """Values and extra [B, K] at t = end, from those at t = start."""
    times = torch.tensor([start, end], dtype=torch.float64, device=extra.device)
    return _along(slope, values, extra, times, integration)[-1]


def path(
    score_fn: ScoreFn, composition: Composition, context: Context, state: State, times: Tensor, integration: Integration
) -> list[Values]:
    """What a clean state has become at each of `times`, which rise from 0."""
    values, slope = starting_values(composition, state), _without_extra(score_fn, composition, context, state)
    return [now for now, _ in _along(slope, values, _nothing(values), times, integration)]


@torch.no_grad()
def _along(
    slope: Slope, values: Values, extra: Tensor, times: Tensor, integration: Integration
) -> list[tuple[Values, Tensor]]:
    """Values and extra at each of `times`, from those at the first."""
    names = tuple(values)

    def function(t: Tensor, packed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rates, rate = slope(t, dict(zip(names, packed[:-1], strict=True)), packed[-1])
        return (*(rates[name] for name in names), rate)

    packed = (*(value.double() for value in values.values()), extra.double())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchdiffeq")
        found = odeint(
            function,
            packed,
            times,
            rtol=integration.rtol,
            atol=integration.atol,
            method=_METHODS[integration.method],
            options=_options(integration, times),
        )
    return [(dict(zip(names, parts, strict=True)), gained) for *parts, gained in zip(*found, strict=True)]


def _options(integration: Integration, times: Tensor) -> dict[str, Any]:
    if integration.method == "dopri5":
        # the last step ends at the end: beyond it, there is no noise level to ask for
        return {"norm": _worst_row, "step_t": times[-1:]}
    grid = torch.linspace(float(times[0]), float(times[-1]), integration.steps + 1, dtype=torch.float64)
    return {"grid_constructor": lambda function, values, t: grid.to(t.device)}


def _worst_row(parts: tuple[Tensor, ...]) -> Tensor:
    """Root mean square over a field of the row where it is largest: no row hides behind its batch."""
    sizes = [part.reshape(len(part), -1).pow(2).mean(1).sqrt().max() for part in parts if part.numel()]
    return torch.stack(sizes).max()


def _without_extra(score_fn: ScoreFn, composition: Composition, context: Context, like: State) -> Slope:
    def slope(t: Tensor, values: Values, extra: Tensor) -> tuple[Values, Tensor]:
        tangent = tangents(score_fn, composition, context, on_manifold(values, like), t)
        return derivatives(composition, values, tangent, t), torch.zeros_like(extra)

    return slope


def _nothing(values: Values) -> Tensor:
    first = next(iter(values.values()))
    return torch.zeros(len(first), 0, dtype=torch.float64, device=first.device)
