"""Physics-informed training of networks that answer a log-density, whose gradient is their score.

In: a function (state, context, t [B]) -> log p_t [B] up to one constant for all t, candidate structures with their reduced
energies and gradients, noise levels, noise, probes. Out: losses [B], differentiable in the network's parameters.

With the processes of physics_informed.py, and before a gradient is taken, the Fokker-Planck equation is

    d log p/dt = sum_f [ g_f²/2 (div_f s_f + |s_f|²) - a_f x_f·s_f - D_f a_f ],      s_f = grad_f log p.

It is solved by log p + c where it is by log p, so that the boundary may be log p_0 = -u with an unknown log Z: the constant
goes along with all t, and at t = 1, where log p_1 is that of the prior, it is read off (`log_partition`). A score's form sees
the weights of two separated states only through scores on the way between them, over which its errors add up; here every
state has its own value, whose error is what the residual adds up to in that state, over log sigma. The price is a network
of one scalar, the energies themselves, and a boundary that candidates on both sides of a barrier share.

Orders: the Laplacian takes second derivatives in x, one order less than the gradient of the equation. On SO(3) the trace
of X_a X_a and its estimate v_a v_b X_a X_b see the symmetric part alone, so that one exponential serves both derivatives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dig_scale.batch import Context, Score, ScoreFn, State, fields_of
from dig_scale.config import PhysicsInformed
from dig_scale.diffusion.composition import Composition
from dig_scale.objectives.physics_informed import (
    Candidates,
    PhysicsDraws,
    Tangents,
    boundary_loss,
    flat_tangents,
    levels_of,
    log_density_rate,
    moved_along,
    rows_in,
    squares,
    zero_tangents,
)

LogDensityFn = Callable[[State, Context, Tensor], Tensor]
"""(noised state, context, t [B]) -> log p_t [B] in nat, up to one constant; invariant under what the context leaves free."""


def log_density_informed_loss(
    log_density: LogDensityFn,
    composition: Composition,
    candidates: Candidates,
    draws: PhysicsDraws,
    settings: PhysicsInformed,
) -> Tensor:
    """Loss [B]: energies and forces at the boundary, the log-density's residual per unit of log sigma inside, in nat².

    Of `settings` the score's rescaling has no place here; `length` weighs forces beside energies.
    """
    context = candidates.batch.context
    noised = composition.perturb(candidates.batch.state, draws.t, draws.noise)
    residual = log_density_residual(log_density, composition, noised, context, draws.t, draws.probes)
    first = next(iter(levels_of(composition, draws.t).values()))
    inside = squares(residual * 2 * first.sigma**2 / first.diffusion, settings.fokker_planck_huber)
    score_fn = score_of(log_density, composition)
    edge = energy_loss(log_density, composition, candidates, settings)
    edge = edge + boundary_loss(score_fn, composition, candidates, settings)
    return settings.boundary_weight * edge + settings.fokker_planck_weight * inside


def energy_loss(
    log_density: LogDensityFn, composition: Composition, candidates: Candidates, settings: PhysicsInformed
) -> Tensor:
    """Squared mismatch [B] of the log-density at settings.boundary_time and -u; raises ValueError without energies."""
    if candidates.reduced_energy is None:
        raise ValueError("candidates of a log-density need their reduced energies; these have gradients alone")
    state, context = candidates.batch.state, candidates.batch.context
    t = torch.full_like(candidates.reduced_energy, settings.boundary_time)
    still = composition.perturb(state, t, State(**zero_tangents(state)))
    found = log_density(still, context, t) + _log_volume(composition, context, t)
    return squares(found + candidates.reduced_energy, settings.boundary_huber)


def log_density_residual(
    log_density: LogDensityFn,
    composition: Composition,
    state: State,
    context: Context,
    t: Tensor,
    probes: tuple[Tangents, ...],
) -> Tensor:
    """sum_f [...] - d log p/dt of the header, [B], at noised states and times t [B]; probes as for scores."""
    zeros = {name: value.requires_grad_() for name, value in zero_tangents(state).items()}
    time = t.detach().clone().requires_grad_()
    moved = moved_along(composition, state, composition.constrained(State(**zeros), context))
    values = log_density(moved, context, time)
    *slopes, rate = torch.autograd.grad(values.sum(), [*zeros.values(), time], create_graph=True)
    scores = flat_tangents(State(**dict(zip(zeros, slopes, strict=True))))
    total = log_density_rate(scores, state, zeros, composition, t, probes)
    degrees = _degrees(composition, context)
    lost = sum(degrees[name] * level.drift for name, level in levels_of(composition, t).items())
    return total - lost - rate


def score_of(log_density: LogDensityFn, composition: Composition) -> ScoreFn:
    """The score: the gradient of a log-density, also where gradients are off; differentiable where they are on."""

    def score_fn(state: State, context: Context, t: Tensor) -> Score:
        further = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            zeros = {name: value.requires_grad_() for name, value in zero_tangents(state).items()}
            moved = moved_along(composition, state, composition.constrained(State(**zeros), context))
            total = log_density(moved, context, t).sum()
            slopes = torch.autograd.grad(total, list(zeros.values()), create_graph=further)
        return Score(**dict(zip(zeros, slopes, strict=True)))

    return score_fn


def log_partition(log_density: LogDensityFn, composition: Composition, prior: State, context: Context) -> Tensor:
    """log Z [B] of exp(-u), with u from the candidates' zero, that states of the prior stand for; its mean estimates it."""
    t = next(iter(fields_of(prior).values())).new_ones(rows_in(prior))
    degrees = _degrees(composition, context)
    exact = sum(
        composition.fields[name].process.prior_log_density(value, degrees[name].expand(len(t)))
        for name, value in fields_of(prior).items()
    )
    with torch.no_grad():
        return log_density(prior, context, t) - exact


def _log_volume(composition: Composition, context: Context, t: Tensor) -> Tensor:
    """log |dx_t/dy| [B] of x_t = alpha y."""
    degrees = _degrees(composition, context)
    parts = [degrees[name] * torch.log(level.alpha) for name, level in levels_of(composition, t).items()]
    return torch.stack([part.expand_as(t) for part in parts]).sum(0)


def _degrees(composition: Composition, context: Context) -> dict[str, Tensor]:
    """Numbers of degrees of freedom [b] of every field."""
    sites = (context.mobile & context.present).sum(1)
    counts = dict.fromkeys(composition.fields, 3 * sites)
    if "positions" in counts:
        counts["positions"] = counts["positions"] - 3 * context.free
    if "lattice" in counts:
        counts["lattice"] = torch.full_like(sites, 6)
    return counts
