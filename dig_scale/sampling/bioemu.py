"""BioEmu's noise and its two samplers (Lewis et al. 2025; microsoft/bioemu): functions of a network callable.

Positions: variance preserving with a cosine schedule, alpha(t) = cos(pi/2 (t+s)/(1+s)) / cos(pi/2 s/(1+s)), in units of
nm; here in Å, so the prior is N(0, (10 Å)^2). Rotations: heat kernel with exp(-l(l+1) sigma^2 / 2), sigma(t) geometric from
0.02 to 1.65, so the variance is sigma^2 and g^2 = 2 sigma^2 ln 82.5; steps are R -> R exp(v). (BioEmu keeps DiG's numbers
with half of DiG's variance.) The network answers with the score of rotations over a scale that BioEmu tabulates: the root of
sum(score^2 p) / (3 sum p) over angles spaced as cubes, taken at the next tabulated sigma.

dpm_solver    DPM-Solver-2 on positions (Lu et al. 2022a, algorithm 1), midpoint with extrapolated score on rotations
heun          Karras et al. 2022, algorithm 2, with noise added back by `churn` of a step; two evaluations a step

Noise comes from dig_scale's counters, so seeds do not mean what they mean to BioEmu's program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dig_scale.batch import Context, Score, ScoreFn, State
from dig_scale.geometry.rotations import exp, random_rotations
from dig_scale.sampling.noise import counter_normal
from dig_scale.sampling.released import Walk
from dig_scale.units import ANGSTROM_PER_NM

BioEmuNetwork = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(positions [B,N,3] Å, rotations [B,N,3,3], t [B]) -> sigma x score of positions, score of rotations / its scale."""


@dataclass(frozen=True)
class AngleTable:
    """How BioEmu tabulates its rotation scale: terms l_max, noise levels, angles, their spacing's exponent, tol."""

    eps_t: float = 1e-4
    num_sigma: int = 1000
    num_omega: int = 2000
    omega_exponent: int = 3
    l_max: int = 2000
    tol: float = 1e-7
    sigma_min: float = 0.02
    sigma_max: float = 1.65


@dataclass(frozen=True)
class BioEmuNoise:
    """BioEmu's two processes: `s` of the cosine schedule and the table of the rotations."""

    s: float = 0.008
    angles: AngleTable = AngleTable()

    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the clean positions at t."""
        return (torch.cos(self._phase(t)) / math.cos(self.s / (1 + self.s) * math.pi / 2)).clamp(0, 1)

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of positions at t, Å."""
        return ANGSTROM_PER_NM * torch.sqrt(1 - self.alpha(t) ** 2)

    def drift_rate(self, t: Tensor) -> Tensor:
        """beta(t): dx = -beta/2 x dt + 10 Å sqrt(beta) dW."""
        return torch.tan(self._phase(t)) * math.pi / (1 + self.s)

    def time_of(self, log_ratio: Tensor) -> Tensor:
        """t at which log(alpha/sigma), sigma in nm, is `log_ratio`."""
        edge = math.log(math.cos(math.pi * self.s / 2 / (1 + self.s)))
        level = torch.exp(-0.5 * torch.log1p(torch.exp(-2 * log_ratio)) + edge)
        return 2 * (1 + self.s) / math.pi * torch.acos(level) - self.s

    def log_ratio(self, t: Tensor) -> Tensor:
        """log(alpha/sigma), sigma in nm."""
        return torch.log(self.alpha(t) * ANGSTROM_PER_NM / self.sigma(t))

    def angle_sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of rotations at t, rad."""
        return _angle_sigma(self.angles, t)

    def angle_rate(self, t: Tensor) -> Tensor:
        """g^2 of rotations at t."""
        return 2 * math.log(self.angles.sigma_max / self.angles.sigma_min) * self.angle_sigma(t) ** 2

    def angle_scale(self, t: Tensor) -> Tensor:
        """Scale of the rotation score at t, 1/rad."""
        grid, scales = _angle_scales(self.angles)
        index = torch.bucketize(self.angle_sigma(t), grid.to(t.device)).clamp(max=len(grid) - 1)
        return scales.to(t.device)[index]

    def _phase(self, t: Tensor) -> Tensor:
        return (t + self.s) / (1 + self.s) * math.pi / 2


def _angle_sigma(table: AngleTable, t: Tensor) -> Tensor:
    return table.sigma_min * (table.sigma_max / table.sigma_min) ** t


@cache
def _angle_scales(table: AngleTable) -> tuple[Tensor, Tensor]:
    """The tabulated sigmas and scales, fp32 as BioEmu keeps them; sums in fp64, all noise levels in one product."""
    grid = _angle_sigma(table, torch.linspace(table.eps_t, 1.0, table.num_sigma))
    omega = torch.linspace(0, 1, table.num_omega, dtype=torch.float64) ** table.omega_exponent * math.pi
    order = torch.arange(table.l_max + 1, dtype=torch.float64)
    levels = order * (order + 1)
    weights = (2 * order + 1) * torch.exp(-levels * grid.double().unsqueeze(1) ** 2 / 2)
    waves = torch.sin((order.unsqueeze(1) + 0.5) * omega)
    slopes = order.unsqueeze(1) * torch.sin((order + 1).unsqueeze(1) * omega)
    slopes = slopes - (order + 1).unsqueeze(1) * torch.sin(order.unsqueeze(1) * omega)
    still = omega <= table.tol
    limit = (weights * (2 * order + 1)).sum(1, keepdim=True)
    density = torch.where(still, limit, weights @ waves / (torch.sin(omega / 2) + table.tol))
    slope = torch.where(still, 0.0, weights @ slopes / (1 - torch.cos(omega) + table.tol))
    likely = (density * (1 - torch.cos(omega)) / math.pi).abs()
    score = slope / (density + table.tol)
    return grid, torch.sqrt((score**2 * likely).sum(1) / (3 * likely.sum(1) + table.tol)).float()


def bioemu_score_fn(network: BioEmuNetwork, noise: BioEmuNoise = BioEmuNoise()) -> ScoreFn:
    """The network as a score function: State(positions Å, rotations), t [B] -> Score per Å and in local tangents."""

    def score_fn(state: State, context: Context, t: Tensor) -> Score:
        return _score(network, noise, state, t)

    return score_fn


def _score(network: BioEmuNetwork, noise: BioEmuNoise, state: State, t: Tensor) -> Score:
    assert state.positions is not None and state.rotations is not None
    translation, rotation = network(state.positions, state.rotations, t)
    return Score(translation / noise.sigma(t)[:, None, None], rotation * noise.angle_scale(t)[:, None, None])


@dataclass(frozen=True)
class BioEmuSteps:
    """Grid of times and noise of a sampler: N times from max_t to eps_t; `churn` of a step is noised again first."""

    steps: int
    max_t: float = 0.99
    eps_t: float = 0.001
    churn: float = 0.0

    def times(self) -> Tensor:
        """The grid [N]."""
        return torch.linspace(self.max_t, self.eps_t, self.steps)

    @property
    def dt(self) -> float:
        """From a time to the next; negative."""
        return -(self.max_t - self.eps_t) / (self.steps - 1)


DPM_STEPS = BioEmuSteps(50)
HEUN_STEPS = BioEmuSteps(100, churn=0.5)
"""The published settings."""


def bioemu_prior(residues: int, walk: Walk) -> State:
    """Start states [B]: positions N(0, (10 Å)^2), rotations uniform."""
    drawn = counter_normal(walk.seed, walk.index, torch.zeros_like(walk.index), 7 * residues)
    positions, quaternions = drawn.view(len(drawn), residues, 7).split([3, 4], dim=-1)
    return State(positions=ANGSTROM_PER_NM * positions, rotations=random_rotations(quaternions))


def dpm_solver(
    network: BioEmuNetwork, start: State, walk: Walk, noise: BioEmuNoise = BioEmuNoise(), grid: BioEmuSteps = DPM_STEPS
) -> State:
    """The state at eps_t from `start` at max_t; two evaluations a step."""
    state = start
    for i, t in enumerate(grid.times()[:-1].tolist()):
        after = t + grid.dt
        state, t = _renoised(state, t, i, walk, noise, grid)
        now, then = (torch.full_like(walk.index, value, dtype=torch.float32) for value in (t, after))
        state = _dpm_step(network, noise, state, now, then)
    return state


def _dpm_step(network: BioEmuNetwork, noise: BioEmuNoise, state: State, t: Tensor, after: Tensor) -> State:
    start, end = noise.log_ratio(t), noise.log_ratio(after)
    middle = noise.time_of((start + end) / 2)
    half, whole = torch.expm1((end - start) / 2), torch.expm1(end - start)
    first = _score(network, noise, state, t)
    assert state.positions is not None and first.positions is not None and first.rotations is not None
    ratio = (noise.alpha(middle) / noise.alpha(t))[:, None, None]
    gain = (noise.sigma(middle) * noise.sigma(t) * half)[:, None, None]
    there = State(
        positions=ratio * state.positions + gain * first.positions,
        rotations=_turned(state, _flow(noise, first.rotations, t, middle - t)),
    )
    second = _score(network, noise, there, middle)
    assert second.positions is not None and second.rotations is not None
    trend = (0.5 * (after - t) / (middle - t))[:, None, None]
    extrapolated = second.rotations + trend * (second.rotations - first.rotations)
    ratio = (noise.alpha(after) / noise.alpha(t))[:, None, None]
    gain = (noise.sigma(after) * noise.sigma(middle) * whole)[:, None, None]
    return State(
        positions=ratio * state.positions + gain * second.positions,
        rotations=_turned(state, _flow(noise, extrapolated, middle, after - t)),
    )


def heun(
    network: BioEmuNetwork, start: State, walk: Walk, noise: BioEmuNoise = BioEmuNoise(), grid: BioEmuSteps = HEUN_STEPS
) -> State:
    """The state one step past eps_t from `start` at max_t, the last step uncorrected where it passes 0."""
    state = start
    for i, t in enumerate(grid.times().tolist()):
        after = t + grid.dt
        noised, t = _renoised(state, t, i, walk, noise, grid)
        now, then = (torch.full_like(walk.index, value, dtype=torch.float32) for value in (t, after))
        slope = _slopes(network, noise, noised, now)
        state = _advanced(noised, slope, then - now)
        if after > 0:
            state = _advanced(noised, _mean(slope, _slopes(network, noise, state, then)), then - now)
    return state


def _slopes(network: BioEmuNetwork, noise: BioEmuNoise, state: State, t: Tensor) -> Score:
    """d/dt of positions (Å) and the rate of rotations (rad) along the probability flow."""
    score = _score(network, noise, state, t)
    assert state.positions is not None and score.positions is not None and score.rotations is not None
    beta = noise.drift_rate(t)[:, None, None]
    positions = -0.5 * beta * (state.positions + ANGSTROM_PER_NM**2 * score.positions)
    return Score(positions, _flow(noise, score.rotations, t, torch.ones_like(t)))


def _flow(noise: BioEmuNoise, score: Tensor, t: Tensor, dt: Tensor) -> Tensor:
    """-g^2/2 score dt of rotations: the probability flow's tangent."""
    return (-0.5 * noise.angle_rate(t) * dt)[:, None, None] * score


def _mean(a: Score, b: Score) -> Score:
    assert a.positions is not None and b.positions is not None and a.rotations is not None and b.rotations is not None
    return Score((a.positions + b.positions) / 2, (a.rotations + b.rotations) / 2)


def _advanced(state: State, slope: Score, dt: Tensor) -> State:
    assert state.positions is not None and slope.positions is not None and slope.rotations is not None
    dt = dt[:, None, None]
    return State(positions=state.positions + dt * slope.positions, rotations=_turned(state, dt * slope.rotations))


def _turned(state: State, tangent: Tensor) -> Tensor:
    assert state.rotations is not None
    return state.rotations @ exp(tangent)


def _renoised(state: State, t: float, i: int, walk: Walk, noise: BioEmuNoise, grid: BioEmuSteps) -> tuple[State, float]:
    """The state carried by the forward process from t to t + churn |dt|, and that time; the first step is left alone."""
    if grid.churn == 0 or i == 0:
        return state, t
    assert state.positions is not None
    ahead, now = -grid.churn * grid.dt, torch.full_like(walk.index, t, dtype=torch.float32)
    beta, rate = noise.drift_rate(now)[:, None, None], noise.angle_rate(now)[:, None, None]
    drawn = counter_normal(walk.seed, walk.index, torch.full_like(walk.index, i), 2 * state.positions[0].numel())
    kicks = drawn.view(len(drawn), 2, *state.positions.shape[1:])
    spread = ANGSTROM_PER_NM * torch.sqrt(beta * ahead)
    positions = state.positions * (1 - 0.5 * beta * ahead) + spread * kicks[:, 0]
    return State(positions=positions, rotations=_turned(state, torch.sqrt(rate * ahead) * kicks[:, 1])), t + ahead
