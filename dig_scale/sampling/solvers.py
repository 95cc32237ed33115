"""Solvers: pure (init, step) pairs with a time PER SAMPLE. One function per published algorithm.

step(score_fn, composition, step, memory) -> (state, memory): a Step holds state, context, t, t_next [B] with t_next < t,
and noise; t_next = CLEAN (below 0) asks for the clean state, for which every solver returns its estimate E[x_0 | x_t].
Rows do not see each other. The state is x_t of the composition's processes; noise is standard normal of its shape.

ancestral            DDPM posterior step (Ho et al. 2020, eq. 6-7; DiG's sampler)      stochastic, weak order 1
euler-maruyama       reverse SDE (Song et al. 2021, eq. 6)                             stochastic, weak order 1
heun                 probability-flow ODE (Karras et al. 2022, algorithm 1)            order 2, two evaluations per step
dpm-solver++2m-ode   DPM-Solver++(2M) (Lu et al. 2022, algorithm 2)                    order 2
dpm-solver++2m-sde   SDE-DPM-Solver++(2M) (Lu et al. 2022, eq. 18)                     stochastic

Plain vectors (positions, cells) have alpha < 1 and take these as published. Rotations and wrapped coordinates have
alpha = 1 and noise variance v(t): with D = move(x, v s) for the clean estimate they take the same algorithms at first
order, posterior step for the stochastic ones and x' = move(x, (v - sqrt(v v')) s) for the deterministic ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dig_scale.batch import Context, Score, ScoreFn, State, fields_of
from dig_scale.config import SolverName
from dig_scale.diffusion.composition import Composition
from dig_scale.diffusion.euclidean import VariancePreserving, per_sample
from dig_scale.diffusion.process import Process

CLEAN = -1.0
"""The time after t = 0: no noise at all."""


@dataclass(frozen=True)
class Memory:
    """What a multistep solver keeps: previous clean estimates, their times [B], and whether there are any [B]."""

    clean: State
    t: Tensor
    filled: Tensor


@dataclass(frozen=True)
class Step:
    """Where walkers stand and what they need to go on: state x_t, context, t and t_next [B], standard noise."""

    state: State
    context: Context
    t: Tensor
    t_next: Tensor
    noise: State

    @property
    def clean(self) -> Tensor:
        """Rows [B] that this step ends without noise."""
        return self.t_next < 0

    @property
    def target(self) -> Tensor:
        """t_next [B], 0 where the step ends without noise."""
        return self.t_next.clamp(min=0)


Advance = Callable[[ScoreFn, Composition, Step, Memory], tuple[State, Memory]]


@dataclass(frozen=True)
class Solver:
    """A named step with its cost in network evaluations."""

    name: SolverName
    step: Advance
    evaluations_per_step: int

    def init(self, state: State) -> Memory:
        """Empty memory for a state."""
        vectors = {
            name: torch.zeros_like(x) for name, x in fields_of(state).items() if name in ("positions", "lattice")
        }
        first = next(iter(fields_of(state).values()))
        t = torch.zeros(len(first), device=first.device)
        return Memory(State(**vectors), t, torch.zeros_like(t, dtype=torch.bool))


@dataclass(frozen=True)
class _Levels:
    """alpha, sigma at t and t_next, shaped to multiply a field; `clean` rows end without noise."""

    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor
    clean: Tensor

    @property
    def step_log_snr(self) -> Tensor:
        """h = log-SNR gained by the step, lambda_next - lambda, with lambda = log(alpha/sigma); 0 for clean rows."""
        ratio = (self.alpha_next * self.sigma) / (self.alpha * self.sigma_next)
        return torch.log(torch.where(self.clean, torch.ones_like(ratio), ratio))


def _levels(process: Process, x: Tensor, step: Step) -> _Levels:
    now, later = process.coefficients(step.t), process.coefficients(step.target)
    shaped = [per_sample(v, x) for v in (now.alpha, now.sigma, later.alpha, later.sigma)]
    return _Levels(shaped[0], shaped[1], shaped[2], shaped[3], per_sample(step.clean, x).bool())


@dataclass(frozen=True)
class _Part:
    """One field within a step: its noised value x, score and noise, with the levels shaped for its tangents."""

    name: str
    process: Process
    x: Tensor
    score: Tensor
    noise: Tensor
    level: _Levels

    @cached_property
    def estimate(self) -> Tensor:
        """E[x_0 | x_t] of a plain vector."""
        return (self.x + self.level.sigma**2 * self.score) / self.level.alpha


Rule = Callable[[_Part], Tensor]
"""A field's value at t_next."""


def _parts(composition: Composition, step: Step, scores: Score) -> list[_Part]:
    given, noise, processes = fields_of(scores), fields_of(step.noise), composition.fields
    return [
        _Part(
            name,
            processes[name].process,
            x,
            given[name],
            noise[name],
            _levels(processes[name].process, given[name], step),
        )
        for name, x in fields_of(step.state).items()
    ]


def _by_field(parts: list[_Part], vector: Rule, curved: Rule) -> State:
    """One step of every field: `vector` for plain vectors, `curved` for the others."""
    return State(**{p.name: (vector if isinstance(p.process, VariancePreserving) else curved)(p) for p in parts})


def _posterior(p: _Part) -> Tensor:
    level, clean = p.level, p.estimate
    ratio = level.alpha / level.alpha_next
    gained = level.sigma**2 - ratio**2 * level.sigma_next**2
    mean = (ratio * level.sigma_next**2 * p.x + level.alpha_next * gained * clean) / level.sigma**2
    spread = torch.sqrt(gained.clamp(min=0)) * level.sigma_next / level.sigma
    return torch.where(level.clean, clean, mean + spread * p.noise)


def _curved_posterior(p: _Part) -> Tensor:
    gained = p.level.sigma**2 - p.level.sigma_next**2
    spread = torch.sqrt(gained.clamp(min=0)) * p.level.sigma_next / p.level.sigma
    tangent = torch.where(p.level.clean, p.level.sigma**2 * p.score, gained * p.score + spread * p.noise)
    return p.process.move(p.x, tangent)


def _flow(p: _Part) -> Tensor:
    n, n_next = p.level.sigma / p.level.alpha, p.level.sigma_next / p.level.alpha_next
    moved = p.level.alpha_next * (p.x / p.level.alpha - (n_next - n) * p.level.sigma * p.score)
    return torch.where(p.level.clean, p.estimate, moved)


def _curved_flow(p: _Part) -> Tensor:
    later = torch.where(p.level.clean, torch.zeros_like(p.level.sigma), p.level.sigma_next)
    return p.process.move(p.x, (p.level.sigma**2 - p.level.sigma * later) * p.score)


def ancestral_step(score_fn: ScoreFn, composition: Composition, step: Step, memory: Memory) -> tuple[State, Memory]:
    """x_s ~ q(x_s | x_t, x_0 = E[x_0 | x_t])."""
    parts = _parts(composition, step, score_fn(step.state, step.context, step.t))
    return _by_field(parts, _posterior, _curved_posterior), memory


def euler_maruyama_step(
    score_fn: ScoreFn, composition: Composition, step: Step, memory: Memory
) -> tuple[State, Memory]:
    """dx = (drift x - diffusion score) dt + sqrt(diffusion) dW, backwards in t."""

    def tangent(p: _Part) -> Tensor:
        dt = per_sample(step.t - step.target, p.score)
        diffusion = per_sample(p.process.coefficients(step.t).diffusion, p.score)
        return diffusion * p.score * dt + torch.sqrt(diffusion * dt) * p.noise

    def vector(p: _Part) -> Tensor:
        drift = per_sample(p.process.coefficients(step.t).drift * (step.t - step.target), p.x)
        return torch.where(p.level.clean, p.estimate, p.process.move(p.x, tangent(p) - drift * p.x))

    def curved(p: _Part) -> Tensor:
        return p.process.move(p.x, torch.where(p.level.clean, p.level.sigma**2 * p.score, tangent(p)))

    parts = _parts(composition, step, score_fn(step.state, step.context, step.t))
    return _by_field(parts, vector, curved), memory


def heun_step(score_fn: ScoreFn, composition: Composition, step: Step, memory: Memory) -> tuple[State, Memory]:
    """dy/dn = (y - D)/n for y = x/alpha, n = sigma/alpha: Euler predictor, trapezoidal corrector; no noise is used.

    Curved fields average the tangents of predictor and corrector.
    """
    parts = _parts(composition, step, score_fn(step.state, step.context, step.t))
    predicted = _by_field(parts, _flow, _curved_flow)
    later = fields_of(score_fn(predicted, step.context, step.target))

    def vector(p: _Part) -> Tensor:
        n, n_next = p.level.sigma / p.level.alpha, p.level.sigma_next / p.level.alpha_next
        slope = -0.5 * (p.level.sigma * p.score + p.level.sigma_next * later[p.name])
        moved = p.level.alpha_next * (p.x / p.level.alpha + (n_next - n) * slope)
        return torch.where(p.level.clean, p.estimate, moved)

    def curved(p: _Part) -> Tensor:
        slope = 0.5 * (p.level.sigma * p.score + p.level.sigma_next * later[p.name])
        moved = (p.level.sigma - p.level.sigma_next) * slope
        return p.process.move(p.x, torch.where(p.level.clean, p.level.sigma**2 * p.score, moved))

    return _by_field(parts, vector, curved), memory


def dpm_solver_ode_step(
    score_fn: ScoreFn, composition: Composition, step: Step, memory: Memory
) -> tuple[State, Memory]:
    """x' = (sigma'/sigma) x + alpha' (1 - e^-h) D', D' extrapolated from this and the previous estimate."""

    def moved(p: _Part, extrapolated: Tensor) -> Tensor:
        level, h = p.level, p.level.step_log_snr
        return level.sigma_next / level.sigma * p.x - level.alpha_next * torch.expm1(-h) * extrapolated

    return _multistep(score_fn, composition, step, memory, moved, _curved_flow)


def dpm_solver_sde_step(
    score_fn: ScoreFn, composition: Composition, step: Step, memory: Memory
) -> tuple[State, Memory]:
    """x' = (sigma'/sigma) e^-h x + alpha' (1 - e^-2h) D' + sigma' sqrt(1 - e^-2h) z."""

    def moved(p: _Part, extrapolated: Tensor) -> Tensor:
        level, h = p.level, p.level.step_log_snr
        decay = -torch.expm1(-2 * h)
        mean = level.sigma_next / level.sigma * torch.exp(-h) * p.x + level.alpha_next * decay * extrapolated
        return mean + level.sigma_next * torch.sqrt(decay.clamp(min=0)) * p.noise

    return _multistep(score_fn, composition, step, memory, moved, _curved_posterior)


def _multistep(
    score_fn: ScoreFn,
    composition: Composition,
    step: Step,
    memory: Memory,
    moved: Callable[[_Part, Tensor], Tensor],
    curved: Rule,
) -> tuple[State, Memory]:
    previous = fields_of(memory.clean)

    def vector(p: _Part) -> Tensor:
        clean, h = p.estimate, p.level.step_log_snr
        usable = per_sample(memory.filled, p.x).bool()
        then = _levels(p.process, p.x, replace(step, t=memory.t))
        gap = torch.log(p.level.alpha / p.level.sigma) - torch.log(then.alpha / then.sigma)
        ratio = torch.where(usable, h / torch.where(usable, gap, torch.ones_like(gap)), torch.zeros_like(h))
        extrapolated = clean + 0.5 * ratio * (clean - previous[p.name])
        return torch.where(p.level.clean, clean, moved(p, extrapolated))

    parts = _parts(composition, step, score_fn(step.state, step.context, step.t))
    state = _by_field(parts, vector, curved)
    kept = {p.name: p.estimate for p in parts if p.name in previous}
    return state, Memory(State(**kept), step.t.to(memory.t.dtype), torch.ones_like(memory.filled))


SOLVERS: dict[SolverName, Solver] = {
    "ancestral": Solver("ancestral", ancestral_step, 1),
    "euler-maruyama": Solver("euler-maruyama", euler_maruyama_step, 1),
    "heun": Solver("heun", heun_step, 2),
    "dpm-solver++2m-ode": Solver("dpm-solver++2m-ode", dpm_solver_ode_step, 1),
    "dpm-solver++2m-sde": Solver("dpm-solver++2m-sde", dpm_solver_sde_step, 1),
}


def solver_named(name: SolverName) -> Solver:
    """The solver of a recipe."""
    return SOLVERS[name]
