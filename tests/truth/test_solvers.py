"""Every solver on targets with an exact score: limits, orders of convergence, distributions."""

from __future__ import annotations

import math

import pytest
import torch

from dig_scale.batch import Context, Score, State
from dig_scale.config import Diffusion
from dig_scale.diffusion.composition import Composition, composition_for
from dig_scale.diffusion.schedule import Schedule, alpha_sigma
from dig_scale.sampling.integrate import sample
from dig_scale.sampling.solvers import SOLVERS, Solver, Step
from dig_scale.system import SystemKind
from dig_scale.toys import GaussianMixture

SCHEDULES = {
    "dig-sigmoid": Diffusion(schedule="dig-sigmoid"),
    "log-linear": Diffusion(schedule="log-linear", noise_min=0.05, noise_max=20),
    "power": Diffusion(schedule="power", noise_min=0.05, noise_max=20),
}
MEAN, STD = 0.7, 0.6


def anchored_context(n_sites: int) -> Context:
    """Sites about an anchor at the origin, so that translations count."""
    long = torch.zeros(1, n_sites, dtype=torch.long)
    pair = torch.zeros(1, n_sites, n_sites, dtype=torch.long)
    there = torch.ones(1, n_sites, dtype=torch.bool)
    anchors = {"anchor": torch.zeros(1, n_sites, 3), "extent": torch.ones(1, n_sites), "free": torch.zeros(1).bool()}
    return Context(
        *(there, there, long, long, long, long, long, pair, pair, pair, pair.float()),
        **anchors,
        cell=torch.zeros(1, 3, 3),
        periodic=torch.zeros(1, 3).bool(),
        condition=torch.zeros(1, 0),
        known=torch.zeros(1, 0).bool(),
        site_features=torch.zeros(1, n_sites, 0),
        pair_features=torch.zeros(1, n_sites, n_sites, 0),
    )


def schedule_of(composition: Composition) -> Schedule:
    return composition.fields["positions"].process.schedule


def exact_score_fn(target: GaussianMixture, composition: Composition):
    def score_fn(state: State, context: Context, t: torch.Tensor) -> Score:
        alpha, sigma = alpha_sigma(schedule_of(composition).noise_std(t))
        flat = state.positions.flatten(1)
        return Score(positions=target.noised_score(flat, alpha.to(flat), sigma.to(flat)).view_as(state.positions))

    return score_fn


def linear_response(solver: Solver, schedule: Diffusion, steps: int, t_end: float) -> tuple[float, float]:
    """Mean and variance that a solver gives to a Gaussian target at t_end, exactly: every step is affine in the noise.

    Row 0 has no noise at all, row 1 + k unit noise in draw k only; float64.
    """
    composition = composition_for(SystemKind.MOLECULE, schedule)
    target = GaussianMixture(torch.full((1, 3), MEAN).double(), torch.tensor([STD]).double(), torch.ones(1).double())
    score_fn, context = exact_score_fn(target, composition), anchored_context(1)
    draws = torch.eye(steps + 1, dtype=torch.float64)
    draws = torch.cat([torch.zeros(1, steps + 1, dtype=torch.float64), draws])
    draw = lambda k: State(draws[:, k, None, None].expand(-1, 1, 3))  # noqa: E731
    state, times = draw(0), torch.linspace(1, t_end, steps + 1, dtype=torch.float64)
    memory = solver.init(state)
    for k in range(steps):
        t, t_next = (times[j].expand(steps + 2) for j in (k, k + 1))
        step = Step(state, context, t, t_next, draw(k + 1))
        state, memory = solver.step(score_fn, composition, step, memory)
    x = state.positions[:, 0, 0]
    return float(x[0]), float(((x[1:] - x[0]) ** 2).sum())


def exact_moments(schedule: Diffusion, t_end: float, follows_ode: bool) -> tuple[float, float]:
    """Mean and variance at t_end of the exact reverse process from a standard-normal prior at t = 1."""
    noise_std = schedule_of(composition_for(SystemKind.MOLECULE, schedule)).noise_std
    (a1, s1), (a0, s0) = (alpha_sigma(noise_std(torch.tensor(t, dtype=torch.float64))) for t in (1.0, t_end))
    start_variance, end_variance = a1**2 * STD**2 + s1**2, a0**2 * STD**2 + s0**2
    if follows_ode:  # y - mean scales with the spread of the marginal
        gain = torch.sqrt(end_variance / start_variance)
    else:  # reverse SDE of an Ornstein-Uhlenbeck process: Gaussian bridge of the marginals
        gain = (a1 / a0) * end_variance / start_variance
    mean = a0 * MEAN + gain * (0 - a1 * MEAN)
    variance = gain**2 * 1.0 + (0 if follows_ode else end_variance - gain**2 * start_variance)
    return float(mean), float(variance)


@pytest.mark.parametrize(
    ("name", "order", "follows_ode"),
    [
        ("heun", 2, True),
        ("dpm-solver++2m-ode", 2, True),
        ("ancestral", 1, False),
        ("euler-maruyama", 1, False),
        ("dpm-solver++2m-sde", 1, False),
    ],
)
@pytest.mark.parametrize("schedule", ["log-linear", "power"])
def test_solver_converges_with_its_order(name: str, order: int, follows_ode: bool, schedule: str) -> None:
    mean, variance = exact_moments(SCHEDULES[schedule], 0.0, follows_ode)
    errors = []
    for steps in (80, 160, 320):
        m, v = linear_response(SOLVERS[name], SCHEDULES[schedule], steps, 0.0)
        errors.append(abs(m - mean) + abs(v - variance))
    observed = math.log2(errors[1] / errors[2])
    assert observed > order - 0.3, f"{name} on {schedule}: errors {errors}, observed order {observed:.2f}"
    assert errors[2] < 0.02


@pytest.mark.parametrize("name", list(SOLVERS))
def test_every_solver_reproduces_the_gaussian_under_digs_schedule(name: str) -> None:
    follows_ode = name in ("heun", "dpm-solver++2m-ode")
    mean, variance = exact_moments(SCHEDULES["dig-sigmoid"], 0.0, follows_ode)
    m, v = linear_response(SOLVERS[name], SCHEDULES["dig-sigmoid"], 499, 0.0)
    assert abs(m - mean) < 5e-3
    assert abs(v - variance) < 5e-3


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_every_solver_finds_both_modes_with_their_weights(name: str, schedule: str) -> None:
    """10 % against 90 %: 4,000 samples have a standard error of 0.5 %; 2.5 % is allowed, which covers the step error."""
    composition = composition_for(SystemKind.MOLECULE, SCHEDULES[schedule])
    means = torch.tensor([[2.0, 0, 0, 0, 0, 0], [-1.0, 1, 0, 0, 0, 0]])
    target = GaussianMixture(means, torch.tensor([0.3, 0.3]), torch.tensor([0.1, 0.9]))
    context = anchored_context(2)
    score_fn = exact_score_fn(target, composition)
    state = sample(score_fn, composition, context, SOLVERS[name], 100, seed=3, index=torch.arange(4000))
    x = state.positions.flatten(1)
    share = (x[:, 0] > 0.5).float().mean()
    assert abs(float(share) - 0.1) < 0.025
    assert float(x[:, 2:].std()) == pytest.approx(0.3, abs=0.03)
