"""Solvers: pure (init, step) pairs with a time PER SAMPLE. One function per published algorithm.

step(score_fn, composition, state, context, t, t_next, memory, noise) -> (state, memory): t, t_next [B] with t_next < t;
t_next = CLEAN (below 0) asks for the clean state, for which every solver returns its estimate E[x_0 | x_t]. Rows do
not see each other. The state is x_t of the composition's process; noise is standard normal of its shape.

ancestral            DDPM posterior step (Ho et al. 2020, eq. 6-7; DiG's sampler)      stochastic, weak order 1
euler-maruyama       reverse SDE (Song et al. 2021, eq. 6)                             stochastic, weak order 1
heun                 probability-flow ODE (Karras et al. 2022, algorithm 1)            order 2, two evaluations per step
dpm-solver++2m-ode   DPM-Solver++(2M) (Lu et al. 2022, algorithm 2)                    order 2
dpm-solver++2m-sde   SDE-DPM-Solver++(2M) (Lu et al. 2022, eq. 18)                     stochastic
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dig_scale.batch import Context, ScoreFn, State
from dig_scale.config import SolverName
from dig_scale.diffusion.composition import Composition
from dig_scale.diffusion.euclidean import per_sample
from dig_scale.diffusion.schedule import alpha_sigma

CLEAN = -1.0
"""The time after t = 0: no noise at all."""


@dataclass(frozen=True)
class Memory:
    """What a multistep solver keeps: previous clean estimate [B,N,3], its log-SNR [B], and whether there is one [B]."""

    clean: Tensor
    log_snr: Tensor
    filled: Tensor


Step = Callable[[ScoreFn, Composition, State, Context, Tensor, Tensor, Memory, State], tuple[State, Memory]]


@dataclass(frozen=True)
class Solver:
    """A named step with its cost in network evaluations."""

    name: SolverName
    step: Step
    evaluations_per_step: int

    def init(self, state: State) -> Memory:
        """Empty memory for a state."""
        x = _positions(state)
        zeros = torch.zeros(len(x), device=x.device, dtype=x.dtype)
        return Memory(torch.zeros_like(x), zeros, torch.zeros(len(x), device=x.device, dtype=torch.bool))


@dataclass(frozen=True)
class _Levels:
    """alpha, sigma at t and t_next, shaped to multiply positions; `clean` rows end without noise."""

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


def _levels(composition: Composition, x: Tensor, t: Tensor, t_next: Tensor) -> _Levels:
    schedule = composition.positions.schedule
    alpha, sigma = alpha_sigma(schedule.noise_std(t))
    alpha_next, sigma_next = alpha_sigma(schedule.noise_std(t_next.clamp(min=0)))
    clean = (t_next < 0).view(-1, *([1] * (x.dim() - 1)))
    shaped = [per_sample(v, x) for v in (alpha, sigma, alpha_next, sigma_next)]
    return _Levels(shaped[0], shaped[1], shaped[2], shaped[3], clean)


def _clean_estimate(score_fn: ScoreFn, state: State, context: Context, t: Tensor, level: _Levels) -> Tensor:
    score = score_fn(state, context, t).positions
    assert score is not None
    return (_positions(state) + level.sigma**2 * score) / level.alpha


def _positions(state: State) -> Tensor:
    assert state.positions is not None
    return state.positions


def _finish(level: _Levels, clean: Tensor, moved: Tensor) -> State:
    return State(positions=torch.where(level.clean, clean, moved))


def ancestral_step(
    score_fn: ScoreFn,
    composition: Composition,
    state: State,
    context: Context,
    t: Tensor,
    t_next: Tensor,
    memory: Memory,
    noise: State,
) -> tuple[State, Memory]:
    """x_s ~ q(x_s | x_t, x_0 = E[x_0 | x_t])."""
    x = _positions(state)
    level = _levels(composition, x, t, t_next)
    clean = _clean_estimate(score_fn, state, context, t, level)
    ratio = level.alpha / level.alpha_next
    gained = level.sigma**2 - ratio**2 * level.sigma_next**2
    mean = (ratio * level.sigma_next**2 * x + level.alpha_next * gained * clean) / level.sigma**2
    spread = torch.sqrt(gained.clamp(min=0)) * level.sigma_next / level.sigma
    return _finish(level, clean, mean + spread * _positions(noise)), memory


def euler_maruyama_step(
    score_fn: ScoreFn,
    composition: Composition,
    state: State,
    context: Context,
    t: Tensor,
    t_next: Tensor,
    memory: Memory,
    noise: State,
) -> tuple[State, Memory]:
    """dx = (drift x - diffusion score) dt + sqrt(diffusion) dW, backwards in t."""
    x = _positions(state)
    level = _levels(composition, x, t, t_next)
    clean = _clean_estimate(score_fn, state, context, t, level)
    score = composition.positions.target(clean, x, t)
    c = composition.positions.coefficients(t)
    dt = per_sample(t - t_next.clamp(min=0), x)
    drift = per_sample(c.diffusion, x) * score - per_sample(c.drift, x) * x
    moved = composition.positions.move(x, drift * dt + torch.sqrt(per_sample(c.diffusion, x) * dt) * _positions(noise))
    return _finish(level, clean, moved), memory


def heun_step(
    score_fn: ScoreFn,
    composition: Composition,
    state: State,
    context: Context,
    t: Tensor,
    t_next: Tensor,
    memory: Memory,
    noise: State,
) -> tuple[State, Memory]:
    """dy/dn = (y - D)/n for y = x/alpha, n = sigma/alpha: Euler predictor, trapezoidal corrector; no noise is used."""
    x = _positions(state)
    level = _levels(composition, x, t, t_next)
    clean = _clean_estimate(score_fn, state, context, t, level)
    n, n_next = level.sigma / level.alpha, level.sigma_next / level.alpha_next
    y = x / level.alpha
    slope = (y - clean) / n
    predicted = y + (n_next - n) * slope
    again = _levels(composition, x, t_next.clamp(min=0), t_next)
    second = _clean_estimate(score_fn, State(predicted * level.alpha_next), context, t_next.clamp(min=0), again)
    moved = y + (n_next - n) * 0.5 * (slope + (predicted - second) / n_next)
    return _finish(level, clean, moved * level.alpha_next), memory


def dpm_solver_ode_step(
    score_fn: ScoreFn,
    composition: Composition,
    state: State,
    context: Context,
    t: Tensor,
    t_next: Tensor,
    memory: Memory,
    noise: State,
) -> tuple[State, Memory]:
    """x' = (sigma'/sigma) x + alpha' (1 - e^-h) D', D' extrapolated from this and the previous estimate."""
    x = _positions(state)
    level = _levels(composition, x, t, t_next)
    clean = _clean_estimate(score_fn, state, context, t, level)
    h = level.step_log_snr
    extrapolated, kept = _second_order(clean, level, h, memory)
    moved = level.sigma_next / level.sigma * x - level.alpha_next * torch.expm1(-h) * extrapolated
    return _finish(level, clean, moved), kept


def dpm_solver_sde_step(
    score_fn: ScoreFn,
    composition: Composition,
    state: State,
    context: Context,
    t: Tensor,
    t_next: Tensor,
    memory: Memory,
    noise: State,
) -> tuple[State, Memory]:
    """x' = (sigma'/sigma) e^-h x + alpha' (1 - e^-2h) D' + sigma' sqrt(1 - e^-2h) z."""
    x = _positions(state)
    level = _levels(composition, x, t, t_next)
    clean = _clean_estimate(score_fn, state, context, t, level)
    h = level.step_log_snr
    extrapolated, kept = _second_order(clean, level, h, memory)
    decay = -torch.expm1(-2 * h)
    moved = level.sigma_next / level.sigma * torch.exp(-h) * x + level.alpha_next * decay * extrapolated
    moved = moved + level.sigma_next * torch.sqrt(decay.clamp(min=0)) * _positions(noise)
    return _finish(level, clean, moved), kept


def _second_order(clean: Tensor, level: _Levels, h: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    log_snr = torch.log(level.alpha / level.sigma)
    last = log_snr - per_sample(memory.log_snr, clean)
    usable = per_sample(memory.filled, clean).bool()
    ratio = torch.where(usable, h / torch.where(usable, last, torch.ones_like(last)), torch.zeros_like(h))
    extrapolated = clean + 0.5 * ratio * (clean - memory.clean)
    return extrapolated, Memory(clean, log_snr.flatten(), torch.ones_like(memory.filled))


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
