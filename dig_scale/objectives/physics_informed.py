"""Physics-informed diffusion pre-training (PIDP; Zheng et al. 2023, DiG, section "PIDP" and Alg. 3): a loss from an energy
function, without data of the equilibrium distribution.

In: a ScoreFn, candidate structures with the gradient of their reduced energy u = E/kT, noise levels, noise, probes. Out:
losses [B] that are differentiable in the network's parameters. Two conditions make a score field that of the noised
Boltzmann distribution: at the first noise level it is -grad u (boundary), and in t it obeys the Fokker-Planck equation.
Networks that answer a log-density, of which the score is the gradient, have a form of their own: see log_density.py.

Fokker-Planck equation of the score. Every field x_f of the state follows dx_f = a_f(t) x_f dt + g_f(t) dW_f, independent of
the others, on a flat space, a torus or SO(3); s_f is the f part of grad log p_t. As div(a_f x_f) = D_f a_f depends on t alone,

    d log p/dt = sum_f [ g_f²/2 (div_f s_f + |s_f|²) - a_f x_f·s_f - D_f a_f ]
    ds_k/dt    = grad_k sum_f [ g_f²/2 (div_f s_f + |s_f|²) - a_f x_f·s_f ]                    (the sum runs over all fields)

which is DiG's form of VP with a = -b/2, g² = b, and of VE with a = 0. On SO(3) grad and div are built from the left-invariant
fields X_a f(R) = d/de f(R exp(e E_a)), a = 1..3, which are the local components that this project's rotation scores have:
s_a = X_a log p. Brownian motion R exp(dv) has the generator g²/2 sum_a X_a², the X_a are antisymmetric against Haar's measure,
so d log p/dt = g²/2 sum_a (X_a s_a + s_a²); X_b acts at fixed t on both sides, and no connection term appears. But the X_a
do not commute, [X_a, X_b] = eps_abc X_c: the second derivative X_b(X_a s_a)(R) is that of s_a(R exp(e E_b) exp(h E_a)) in e
and h at 0, a product of two exponentials, never exp(e E_b + h E_a), which would symmetrise it. Hence the two moves below.

Derivatives in t are forward-mode, which also makes networks with fused kernels take their differentiable reference.
Divergences are in the subspace that moves (free molecules: no centre of mass). Knows neither networks nor engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dig_scale.batch import Batch, Context, ScoreFn, State, fields_of
from dig_scale.config import PhysicsInformed
from dig_scale.diffusion.composition import Composition
from dig_scale.diffusion.euclidean import per_sample
from dig_scale.diffusion.process import Coefficients

Tangents = State
"""One tangent vector per diffusing field, as noise has them: positions, rotations, fractional [B, N, 3], lattice [B, 6]."""


@dataclass(frozen=True)
class Candidates:
    """Clean structures with grad u [1/Å; 1/rad in local frames for rotations] of each diffusing field, and for networks that
    answer a log-density u [B] itself (kT, from any zero that all candidates share)."""

    batch: Batch
    gradient: Tangents
    reduced_energy: Tensor | None = None


@dataclass(frozen=True)
class PhysicsDraws:
    """What is random in one evaluation: t [B], noise of the candidates, and the probes of the divergence."""

    t: Tensor
    noise: State
    probes: tuple[Tangents, ...]


def physics_informed_loss(
    score_fn: ScoreFn, composition: Composition, candidates: Candidates, draws: PhysicsDraws, settings: PhysicsInformed
) -> Tensor:
    """Loss [B]: boundary term of the candidates and Fokker-Planck term of the noised ones, with the weights of `settings`."""
    context = candidates.batch.context
    noised = composition.perturb(candidates.batch.state, draws.t, draws.noise)
    residual = fokker_planck_residual(score_fn, composition, noised, context, draws.t, draws.probes)
    inside = fokker_planck_loss(residual, composition, context, draws.t, settings)
    edge = boundary_loss(score_fn, composition, candidates, settings)
    return settings.boundary_weight * edge + settings.fokker_planck_weight * inside


def boundary_loss(
    score_fn: ScoreFn, composition: Composition, candidates: Candidates, settings: PhysicsInformed
) -> Tensor:
    """Mismatch [B] of the score at settings.boundary_time and -grad u.

    `force`: mean square of (s + grad u) scale over what moves, see `residual_scale`; `direction`: 2 - 2 cos of the angle
    between s and -grad u, every field a vector of its own, as DiG did for proteins.
    """
    state, context = candidates.batch.state, candidates.batch.context
    values = fields_of(state)
    t = next(iter(values.values())).new_full((rows_in(state),), settings.boundary_time)
    scores = _boundary_scores(score_fn, composition, state, context, t)
    wanted = composition.constrained(candidates.gradient, context)
    if settings.boundary == "direction":
        return _direction_loss(scores, wanted)
    scale = {name: residual_scale(level, settings) for name, level in levels_of(composition, t).items()}
    errors = {name: (score + _of(wanted, name)) for name, score in fields_of(scores).items()}
    return _mean_over_degrees(errors, scale, context, settings.boundary_huber)


def _boundary_scores(
    score_fn: ScoreFn, composition: Composition, state: State, context: Context, t: Tensor
) -> Tangents:
    """Scores on the scale of the data, d log p/dy = alpha s(alpha y), at noise level t, of structures without noise."""
    still = State(**zero_tangents(state))
    scores = _scores(score_fn, composition, composition.perturb(state, t, still), context, t)
    levels = levels_of(composition, t)
    return State(**{n: per_sample(levels[n].alpha, value) * value for n, value in fields_of(scores).items()})


def _direction_loss(scores: Tangents, gradient: Tangents) -> Tensor:
    losses = []
    for name, score in fields_of(scores).items():
        cosine = torch.nn.functional.cosine_similarity(score.flatten(1), -_of(gradient, name).flatten(1), dim=1)
        losses.append(2 - 2 * cosine)
    return torch.stack(losses).sum(0)


def fokker_planck_loss(
    residual: Tangents, composition: Composition, context: Context, t: Tensor, settings: PhysicsInformed
) -> Tensor:
    """Mean [B] over what moves of the squared (or Huber) residual per unit of log sigma, times `residual_scale`.

    DiG's rescaling divides it by rho^(1 - clip(t)), clip(t) = min(0.05, t); rho = 1 leaves it as it is.
    """
    scales = {}
    for name, level in levels_of(composition, t).items():
        log_rate = level.diffusion / (2 * level.sigma**2)
        scales[name] = residual_scale(level, settings) / log_rate
    loss = _mean_over_degrees(fields_of(residual), scales, context, settings.fokker_planck_huber)
    return loss / settings.rescaling ** (1 - t.clamp(max=0.05))


def residual_scale(level: Coefficients, settings: PhysicsInformed) -> Tensor:
    """What turns errors of scores into errors of log-densities (nat), [B]: sqrt(sigma² + length²), in the field's unit.

    A smaller length lets the weights of states that a barrier separates drift while the noise grows.
    """
    return torch.sqrt(level.sigma**2 + settings.length**2)


def fokker_planck_residual(
    score_fn: ScoreFn, composition: Composition, state: State, context: Context, t: Tensor, probes: Sequence[Tangents]
) -> Tangents:
    """grad_k sum_f [...] - ds_k/dt of the header at noised states and times t [B], for every field k.

    The divergence is sum_n v_n·(ds v_n) over `probes`: exact with `exact_probes`, unbiased with `random_probes`.
    """
    zeros = zero_tangents(state)
    here, near = ({name: value.clone().requires_grad_() for name, value in zeros.items()} for _ in range(2))
    first = moved_along(composition, state, composition.constrained(State(**here), context))
    second = moved_along(composition, first, State(**near))

    def flat_scores(time: Tensor) -> Tensor:
        return flat_tangents(_scores(score_fn, composition, second, context, time))

    flat, rate = cast(tuple[Tensor, Tensor], torch.func.jvp(flat_scores, (t,), (torch.ones_like(t),)))
    total = log_density_rate(flat, first, near, composition, t, probes)
    gradient = torch.autograd.grad(total.sum(), list(here.values()), create_graph=True)
    return _unflat(torch.cat([part.flatten(1) for part in gradient], dim=1) - rate, zeros)


def log_density_rate(
    scores: Tensor,
    state: State,
    near: dict[str, Tensor],
    composition: Composition,
    t: Tensor,
    probes: Sequence[Tangents],
) -> Tensor:
    """sum_f [ g_f²/2 (div_f s_f + |s_f|²) - a_f x_f·s_f ] at `state` [B], from flat scores [B, D] moved by `near`."""
    levels = levels_of(composition, t)
    half = {name: per_sample(levels[name].diffusion / 2, value).expand_as(value) for name, value in near.items()}
    weight = flat_tangents(State(**half))
    rate = (weight * scores**2).sum(1)
    for probe in probes:
        v = flat_tangents(probe)
        turned = torch.autograd.grad((scores * weight * v).sum(), list(near.values()), create_graph=True)
        rate = rate + (torch.cat([part.flatten(1) for part in turned], dim=1) * v).sum(1)
    for name, part in fields_of(_unflat(scores, near)).items():
        value = _of(state, name)
        if value.shape == part.shape:  # plain vectors; rotations have no drift
            rate = rate - levels[name].drift * (value * part).flatten(1).sum(1)
    return rate


def exact_probes(composition: Composition, state: State, context: Context) -> tuple[Tangents, ...]:
    """Probes of the exact divergence: unit vectors of every coordinate, restricted to what may move."""
    rows, width = rows_in(state), composition.normals(context)
    like = next(iter(fields_of(state).values()))
    basis = torch.eye(width, dtype=like.dtype, device=like.device)
    found = [composition.noise(unit.expand(rows, width), context) for unit in basis]
    return tuple(probe for probe in found if any(bool(value.any()) for value in fields_of(probe).values()))


def random_probes(composition: Composition, context: Context, signs: Tensor) -> tuple[Tangents, ...]:
    """Hutchinson's K probes from random signs [K, B, composition.normals(context)] of ±1 (DiG, Alg. 3)."""
    return tuple(composition.noise(one * len(signs) ** -0.5, context) for one in signs)


def random_signs(count: int, rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Rademacher numbers [count, rows, width]."""
    return torch.randint(0, 2, (count, rows, width), generator=generator).float() * 2 - 1


def draw_physics_times(n: int, settings: PhysicsInformed, generator: torch.Generator) -> Tensor:
    """t [n] in [boundary_time, 1], stratified, with density proportional to exp(-time_decay t)."""
    uniform = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    start, decay = settings.boundary_time, settings.time_decay
    if decay == 0:
        return start + (1 - start) * uniform
    return start - torch.log1p(-uniform * -torch.expm1(torch.tensor(-decay * (1 - start)))) / decay


def accepted_candidates(gradient_norms: Tensor, decades: float) -> Tensor:
    """Which candidates [F] to keep: |grad u| within `decades` orders of magnitude of the smallest (finite) one; DiG kept 3."""
    finite = torch.isfinite(gradient_norms)
    smallest = gradient_norms[finite].min() if bool(finite.any()) else gradient_norms.new_tensor(0.0)
    return finite & (gradient_norms <= smallest * 10**decades)


def rigid_gradient(rotations: Tensor, centres: Tensor, atoms: Tensor, atom_gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of u in a rigid residue's centre [B, N, 3] and rotation [B, N, 3] (local tangent) from its A atoms.

    rotations [B, N, 3, 3], centres [B, N, 3] Å, atoms and atom_gradients [B, N, A, 3] (gradients of absent atoms 0). With
    x = C + R exp(v) x_local, du/dC = sum g and du/dv = sum x_local × Rᵀ g.
    """
    local, turned = (atoms - centres.unsqueeze(-2)) @ rotations, atom_gradients @ rotations
    return atom_gradients.sum(-2), torch.linalg.cross(local, turned).sum(-2)


def _scores(score_fn: ScoreFn, composition: Composition, state: State, context: Context, t: Tensor) -> Tangents:
    return composition.constrained(State(**fields_of(score_fn(state, context, t))), context)


def moved_along(composition: Composition, state: State, tangents: Tangents) -> State:
    """The state after a step along tangents, on every field's manifold."""
    moved = {n: composition.fields[n].process.move(_of(state, n), value) for n, value in fields_of(tangents).items()}
    return State(**moved)


def levels_of(composition: Composition, t: Tensor) -> dict[str, Coefficients]:
    """The schedule of every field at t [B]."""
    return {name: field.process.coefficients(t) for name, field in composition.fields.items()}


def zero_tangents(state: State) -> dict[str, Tensor]:
    """Tangents at rest; a rotation [B, N, 3, 3] has a tangent [B, N, 3]."""
    zeros = {}
    for name, value in fields_of(state).items():
        zeros[name] = torch.zeros_like(value[..., 0] if value.dim() == 4 else value).detach()
    return zeros


def rows_in(state: State) -> int:
    """Number of states B."""
    return len(next(iter(fields_of(state).values())))


def flat_tangents(tangents: Tangents) -> Tensor:
    """All fields in one row each, [B, D]."""
    return torch.cat([value.flatten(1) for value in fields_of(tangents).values()], dim=1)


def _unflat(values: Tensor, like: dict[str, Tensor]) -> Tangents:
    parts = values.split([one[0].numel() for one in like.values()], dim=1)
    return State(**{name: part.reshape(one.shape) for (name, one), part in zip(like.items(), parts, strict=True)})


def _mean_over_degrees(
    errors: dict[str, Tensor], scales: dict[str, Tensor], context: Context, huber: float | None
) -> Tensor:
    """Mean [B] over what moves of squares (2 Huber beyond `huber`) of scaled errors; fields add up."""
    sites = (context.mobile & context.present).sum(1).clamp(min=1)
    total = torch.zeros(())
    for name, error in errors.items():
        cost = squares(per_sample(scales[name], error) * error, huber)
        total = total + cost.flatten(1).sum(1) / (6 if name == "lattice" else 3 * sites)
    return total


def squares(errors: Tensor, huber: float | None) -> Tensor:
    """Squares of errors of any shape, that go on linearly beyond `huber`."""
    if huber is None:
        return errors**2
    return 2 * torch.nn.functional.huber_loss(errors, torch.zeros_like(errors), reduction="none", delta=huber)


def _of(state: State, name: str) -> Tensor:
    value: Tensor | None = getattr(state, name)
    assert value is not None
    return value
