"""Sequential Monte Carlo towards exp(-strength U(x_0)): Feynman-Kac steering that keeps its importance weights.

A population walks from the prior by a stochastic solver. Before every step U is read off the clean estimate, and walkers are
weighted by the ratio G = exp(r - r_previous), r = -strength U(E[x_0 | x_t]); where the effective sample size falls below a
threshold they are resampled, and those that are copies go on with noise of their own slot. The ratios telescope, so the
final weights are exact whatever the estimates on the way: weighted averages converge, as the population grows, to those
of p(x_0) exp(-strength U(x_0))/Z, p being what the solver samples without steering (Singhal et al. 2025; Del Moral 2004). Of a
finite population self-normalised averages are off by O(1/N). No transition density is needed, as no step is changed.

Noise is a function of (seed, index, step), so a population is repeatable; it is one batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dig_scale.batch import Context, Geometry, Score, ScoreFn, State
from dig_scale.diffusion.composition import Composition
from dig_scale.errors import UserError
from dig_scale.sampling.clean_estimate import clean_estimate, geometry_of
from dig_scale.sampling.guidance import Property
from dig_scale.sampling.integrate import Walkers, advance, step_times, walkers_at_start
from dig_scale.sampling.noise import counter_normal
from dig_scale.sampling.solvers import Solver
from dig_scale.tree import tree_select

HIGHEST_BIAS = 1e4
"""nat; a bias counts for at most this, of either sign, and for this where it is not a number."""
_RESAMPLING_STREAM = 2**62
"""Added to an index: the noise of resampling is no walker's."""


@dataclass(frozen=True)
class Steering:
    """Strength of the tilt, ESS/N below which walkers are resampled (0: never), and the time from which U counts.

    Early estimates of the clean structure are averages of all there is, which may say little of U: `start` < 1 waits.
    """

    strength: float = 1.0
    resample_below: float = 0.5
    start: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise UserError(f"steering strength {self.strength}: expected a finite number")
        if not 0 <= self.resample_below <= 1 or not 0 <= self.start <= 1:
            raise UserError(
                f"steering resamples below {self.resample_below:g} of the walkers from t = {self.start:g}: "
                "expected numbers from 0 to 1"
            )


@dataclass(frozen=True)
class Run:
    """What fixes a population: solver, number of steps, seed, and the walkers' indices [B] int64."""

    solver: Solver
    steps: int
    seed: int
    index: Tensor


@dataclass(frozen=True)
class Steered:
    """A population of clean states and its weights, fp64.

    log_weights [B] nat: towards p(x_0) exp(-strength U), not normalised; the mean of their exponentials estimates Z.
    bias [B] nat: strength U(x_0), what MBAR needs to combine windows. lineage [B]: the walker of the start that each
    descends from. ess [steps + 1]: effective sample size before every step and at the end; resampled: at which steps.
    """

    state: State
    log_weights: Tensor
    bias: Tensor
    lineage: Tensor
    ess: Tensor
    resampled: tuple[int, ...]

    @property
    def log_normaliser(self) -> float:
        """log Z, Z = E[exp(-strength U(x_0))] over unsteered samples."""
        return float(_log_mean(self.log_weights))

    @property
    def log_weights_unsteered(self) -> Tensor:
        """log-weights [B] nat towards p(x_0), the distribution without steering."""
        return self.log_weights + self.bias

    @property
    def distinct(self) -> int:
        """Walkers of the start that have descendants; few mean that errors are larger than the ESS tells."""
        return len(torch.unique(self.lineage))


@dataclass(frozen=True)
class _Course:
    """What all steps of a run share."""

    score_fn: ScoreFn
    composition: Composition
    context: Context
    potential: Property
    settings: Steering
    solver: Solver

    def bias(self, state: State) -> Tensor:
        """strength U [B] nat, fp64, of clean states."""
        return bias_of(geometry_of(self.composition, state, self.context), self.context, self.potential, self.settings)


@dataclass(frozen=True)
class _Population:
    walkers: Walkers
    bias: Tensor
    log_weights: Tensor
    lineage: Tensor
    ess: tuple[float, ...] = ()
    resampled: tuple[int, ...] = ()


def steer(
    score_fn: ScoreFn, composition: Composition, context: Context, potential: Property, settings: Steering, run: Run
) -> Steered:
    """A population steered towards low values [B] (nat) of `potential` on clean structures; without gradients.

    Raises UserError for a solver without noise, whose resampled copies would stay copies.
    """
    _require_noise(run.solver)
    index, course = run.index, _Course(score_fn, composition, context, potential, settings, run.solver)
    seeds, counts = torch.full_like(index, run.seed), torch.full_like(index, run.steps)
    walkers = walkers_at_start(composition, context, run.solver, seeds, index, counts)
    nothing = torch.zeros(len(index), dtype=torch.float64, device=index.device)
    population = _Population(walkers, nothing, nothing, torch.arange(len(index), device=index.device))
    with torch.no_grad():
        for _ in range(run.steps):
            population = _stepped(course, population)
        last = _weighted(population, course.bias(population.walkers.state))
    ess = torch.tensor(last.ess, dtype=torch.float64)
    return Steered(last.walkers.state, last.log_weights, last.bias, last.lineage, ess, last.resampled)


def bias_of(geometry: Geometry, context: Context, potential: Property, settings: Steering) -> Tensor:
    """strength U [B] nat, fp64, of structures, within HIGHEST_BIAS; raises UserError for another shape."""
    values = potential(geometry, context).detach().double()
    rows = len(geometry.positions)
    if values.shape != (rows,):
        raise UserError(
            f"the potential answered with shape {tuple(values.shape)}: expected one number per sample, ({rows},)"
        )
    found = torch.nan_to_num(settings.strength * values, nan=HIGHEST_BIAS)
    return found.clamp(-HIGHEST_BIAS, HIGHEST_BIAS)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Kish's effective sample size, (sum w)²/sum w², of log-weights [B]."""
    return torch.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0))


def systematic_resampling(log_weights: Tensor, uniform: Tensor) -> Tensor:
    """Ancestors [B] of a population: each walker has floor or ceil of its share of B descendants (Kitagawa 1996)."""
    count = len(log_weights)
    edges = torch.softmax(log_weights, 0).cumsum(0)
    places = (uniform + torch.arange(count, device=log_weights.device)) / count
    return torch.searchsorted(edges / edges[-1], places.to(edges)).clamp(max=count - 1)


def _stepped(course: _Course, population: _Population) -> _Population:
    """Weigh, resample where it is due, and go on by one step, with one evaluation of the score."""
    walkers = population.walkers
    t = step_times(walkers.step, walkers.steps)
    score = course.score_fn(walkers.state, course.context, t)
    if bool((t <= course.settings.start).all()):
        bias = course.bias(clean_estimate(course.composition, walkers.state, score, t))
        population = _weighted(population, bias)
    else:
        population = _weighted(population, population.bias)
    if population.ess[-1] < course.settings.resample_below * len(t):
        population, score = _resampled(population, score)
    known: ScoreFn = lambda state, context, t: score  # noqa: E731
    moved = advance(known, course.composition, course.context, course.solver, population.walkers)
    return replace(population, walkers=moved)


def _weighted(population: _Population, bias: Tensor) -> _Population:
    log_weights = population.log_weights + population.bias - bias
    ess = (*population.ess, float(effective_sample_size(log_weights)))
    return replace(population, bias=bias, log_weights=log_weights, ess=ess)


def _resampled(population: _Population, score: Score) -> tuple[_Population, Score]:
    """Descendants with equal weights, which keep the mean weight; slots keep their index and so their noise."""
    walkers, log_weights = population.walkers, population.log_weights
    step = int(walkers.step[0])
    ancestors = systematic_resampling(log_weights, _uniform(walkers))
    chosen = replace(
        walkers, state=tree_select(walkers.state, ancestors), memory=tree_select(walkers.memory, ancestors)
    )
    resampled = replace(
        population,
        walkers=chosen,
        bias=population.bias[ancestors],
        log_weights=torch.full_like(log_weights, float(_log_mean(log_weights))),
        lineage=population.lineage[ancestors],
        resampled=(*population.resampled, step),
    )
    return resampled, tree_select(score, ancestors)


def _uniform(walkers: Walkers) -> Tensor:
    """One number in [0, 1) for this population and step, [1] fp64."""
    first = walkers.index[:1] + _RESAMPLING_STREAM
    normal = counter_normal(walkers.seed[:1], first, walkers.step[:1], 1)
    return torch.special.ndtr(normal.double())[0]


def _require_noise(solver: Solver) -> None:
    if solver.name not in ("ancestral", "euler-maruyama", "dpm-solver++2m-sde"):
        raise UserError(
            f"solver {solver.name!r} draws no noise, so resampled walkers would stay copies of each other; steer with "
            "ancestral, euler-maruyama or dpm-solver++2m-sde"
        )


def _log_mean(log_weights: Tensor) -> Tensor:
    return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))
