"""Toys learned from their energy alone (physics-informed pre-training, no equilibrium data), judged by Jensen-Shannon
divergence to the exact density: rows of benchmarks/physics.py.

Candidates are short random walks, 2 and 3 times too warm and not equilibrated. The network is a plain multilayer
perceptron for the log-density, behind the same Composition, equation and solvers as any molecule.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.rows import Row, at_most, note
from benchmarks.toy_networks import FourierPerceptron, trained
from dig_scale.batch import Batch, Context, ScoreFn, State
from dig_scale.config import Diffusion, PhysicsInformed
from dig_scale.objectives.log_density import LogDensityFn, log_density_informed_loss, log_partition, score_of
from dig_scale.objectives.physics_informed import (
    Candidates,
    PhysicsDraws,
    accepted_candidates,
    draw_physics_times,
    exact_probes,
)
from dig_scale.sampling.integrate import sample
from dig_scale.sampling.solvers import SOLVERS
from dig_scale.toy_states import ToySystem, toy_system
from dig_scale.toys import DoubleWell, MuellerBrown, Toy
from dig_scale.tree import tree_select

HEATS = (2.0, 3.0)
"""Temperatures of the candidates' walks, in that of the distribution to be learned."""
JS_BAR = 0.02
"""nat."""
SCHEDULE = Diffusion(schedule="log-linear", noise_min=0.01, noise_max=10.0)
SETTINGS = PhysicsInformed(batch=512, probes=None, length=0.3, boundary_huber=1.0, fokker_planck_huber=1.0)
STEPS = 2500
GROWTH = 0.6
"""Share of the steps after which all noise levels are trained."""
_SCALE = 5.0
"""kT that the network's answer of 1 stands for."""


@dataclass(frozen=True)
class Exercise:
    """A toy to be learned from its energy: where candidates start, [2, d] low and high corner, and the judge's bins."""

    name: str
    toy: Toy
    box: tuple[tuple[float, ...], tuple[float, ...]]
    bins: int


EXERCISES = (
    Exercise("double well", DoubleWell(barrier=4.0, width=1.5), ((-2.5,), (2.5,)), 60),
    Exercise("Mueller-Brown, kT 15", MuellerBrown(kT=15.0), ((-1.6, -0.4), (1.2, 2.0)), 40),
)


class ToyDensity(nn.Module):
    """Multilayer perceptron for log p of a toy's own coordinates; those behind them are standard normals.

    In: coordinates [B, D] on the scale of the data and noise levels [B]. Out: log p [B] up to a constant: the log-density of
    a noised normal with the candidates' `mean` and `variance` [d], and the answer of the network, whose Fourier features are
    damped by noise as the density is.
    """

    levels: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor([0.03, 0.1, 0.3, 1.0, 3.0]))
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)
        self.net = FourierPerceptron(len(mean), len(mean) + len(self.levels), 1, width=96)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """[B]."""
        n2, d = noise.unsqueeze(1) ** 2, len(self.mean)
        own, rest = x[:, :d] - self.mean, x[:, d:]
        scaled = torch.cat([own / torch.sqrt(self.variance + n2), n2 / (n2 + self.levels**2)], dim=1)
        answer = self.net(own, n2, scaled).squeeze(1)
        return _normal(own, self.variance + n2) + _normal(rest, 1 + n2) + _SCALE * answer


def _normal(x: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (x**2 / variance + torch.log(variance)).sum(1)


def log_density_of(system: ToySystem, network: nn.Module) -> LogDensityFn:
    """log p_t [B] of noised states, from a network that knows the scale of the data."""

    def log_density(state: State, context: Context, t: Tensor) -> Tensor:
        seen = system.coordinates(system.composition.seen(state, context, t).positions)
        alpha = system.composition.fields["positions"].process.coefficients(t).alpha
        found: Tensor = network(seen, system.composition.noise_level(t))
        return found - seen.shape[1] * torch.log(alpha)

    return log_density


def hot_walk(system: ToySystem, exercise: Exercise, walkers: int, steps: int, generator: torch.Generator) -> Tensor:
    """Positions [walkers, 1, 3] after a Metropolis walk from uniform points in the box, each at one of HEATS temperatures."""
    low, high = (torch.tensor(corner) for corner in exercise.box)
    x = system.state(low + (high - low) * torch.rand(walkers, len(low), generator=generator)).positions
    assert x is not None
    energy, heat = system.reduced_energy(x), torch.tensor(HEATS).repeat(-(-walkers // len(HEATS)))[:walkers]
    for _ in range(steps):
        moved = x + 0.2 * torch.randn(x.shape, generator=generator)
        new = system.reduced_energy(moved)
        accepted = torch.rand(walkers, generator=generator) < torch.exp((energy - new) / heat)
        x, energy = torch.where(accepted[:, None, None], moved, x), torch.where(accepted, new, energy)
    return x


def candidates_of(system: ToySystem, exercise: Exercise, count: int, seed: int) -> Candidates:
    """About `count` candidates with energies (from the lowest on) and gradients, those with the largest forces left out."""
    x = hot_walk(system, exercise, count, 150, torch.Generator().manual_seed(seed)).requires_grad_()
    energy = system.reduced_energy(x)
    gradient = torch.autograd.grad(energy.sum(), x)[0]
    kept = accepted_candidates(gradient.flatten(1).norm(dim=1), decades=SETTINGS.force_decades + 1)
    batch = Batch(State(x.detach()[kept]), system.context, (exercise.name,))
    return Candidates(batch, State(gradient[kept]), (energy - energy.min()).detach()[kept])


def learn(system: ToySystem, exercise: Exercise, candidates: Candidates) -> ToyDensity:
    """A network trained on the energy alone: noise grows over the first part of the steps, so that the equation always
    carries on from what is learned already."""
    places = candidates.batch.state.positions
    assert places is not None
    own = system.coordinates(places)[:, : exercise.toy.dimension]
    network = ToyDensity(own.mean(0), own.var(0))
    log_density, generator = log_density_of(system, network), torch.Generator().manual_seed(0)

    def loss_of(step: int) -> Tensor:
        part = drawn(candidates, SETTINGS.batch, generator)
        draws = physics_draws(system, part, min(1.0, 0.05 + step / (GROWTH * STEPS)), generator)
        return log_density_informed_loss(log_density, system.composition, part, draws, SETTINGS).mean()

    return trained(network, loss_of, STEPS, average=0.995)


def drawn(candidates: Candidates, count: int, generator: torch.Generator) -> Candidates:
    """`count` random candidates."""
    state, energy = candidates.batch.state, candidates.reduced_energy
    assert state.positions is not None and energy is not None
    rows = torch.randint(len(state.positions), (count,), generator=generator)
    batch = Batch(tree_select(state, rows), candidates.batch.context, candidates.batch.systems)
    return Candidates(batch, tree_select(candidates.gradient, rows), energy[rows])


def physics_draws(system: ToySystem, part: Candidates, front: float, generator: torch.Generator) -> PhysicsDraws:
    """Times up to `front`, noise and exact probes for a batch of candidates."""
    context, state = part.batch.context, part.batch.state
    t = front * draw_physics_times(SETTINGS.batch, SETTINGS, generator)
    normals = torch.randn(SETTINGS.batch, system.composition.normals(context), generator=generator)
    probes = exact_probes(system.composition, state, context)
    return PhysicsDraws(t, system.composition.noise(normals, context), probes)


def samples_of(system: ToySystem, score_fn: ScoreFn, count: int, steps: int) -> Tensor:
    """Coordinates [count, D] of the stochastic solver that recipes have too."""
    solver = SOLVERS["dpm-solver++2m-sde"]
    with torch.no_grad():
        parts = [
            sample(score_fn, system.composition, system.context, solver, steps, 7, torch.arange(low, low + 5000))
            for low in range(0, count, 5000)
        ]
    return torch.cat([system.coordinates(part.positions) for part in parts if part.positions is not None])


def log_z_of(system: ToySystem, network: nn.Module) -> float:
    """log Z of exp(-u) with u from the candidates' zero, as the model has it at the largest noise."""
    normals = torch.randn(4096, system.toy.dimension, generator=torch.Generator().manual_seed(5))
    prior = system.composition.prior(system.composition.noise(normals, system.context))
    return float(log_partition(log_density_of(system, network), system.composition, prior, system.context).mean())


def cells_of(x: Tensor, exercise: Exercise) -> Tensor:
    """Bin of every point [S, d] in the box widened by a quarter on each side; one more number is what lies outside."""
    low, high = (torch.tensor(corner, dtype=x.dtype) for corner in exercise.box)
    margin = 0.25 * (high - low)
    place = ((x - low + margin) / (high - low + 2 * margin) * exercise.bins).floor().long()
    inside = ((place >= 0) & (place < exercise.bins)).all(1)
    powers = exercise.bins ** torch.arange(x.shape[1])
    return torch.where(inside, (place * powers).sum(1), exercise.bins ** x.shape[1])


def histogram(x: Tensor, exercise: Exercise) -> Tensor:
    """Shares of points [S, d] in the cells."""
    return torch.bincount(cells_of(x, exercise), minlength=exercise.bins ** x.shape[1] + 1).double() / len(x)


def jensen_shannon(p: Tensor, q: Tensor) -> float:
    """Divergence in nat of two histograms."""
    middle = (p + q) / 2
    return float(sum(torch.special.xlogy(one, one / middle.clamp(min=1e-300)).sum() for one in (p, q)) / 2)


def exact_histogram(exercise: Exercise, fine: int = 8) -> Tensor:
    """The exact shares of the same bins by the midpoint rule; nothing lies outside."""
    low, high = (torch.tensor(corner, dtype=torch.float64) for corner in exercise.box)
    margin = 0.25 * (high - low)
    count = exercise.bins * fine
    centres = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    axes = [a - m + (b - a + 2 * m) * centres for a, b, m in zip(low, high, margin, strict=True)]
    points = torch.cartesian_prod(*axes).view(-1, len(axes))
    weight = torch.exp(-exercise.toy.reduced_energy(points) - exercise.toy.log_z)
    cells = cells_of(points, exercise)
    shares = torch.zeros(exercise.bins ** len(axes) + 1, dtype=torch.float64).index_add_(0, cells, weight)
    return shares / shares.sum()


def rows_of(exercise: Exercise) -> list[Row]:
    """Train on the energy, sample, and judge."""
    system = toy_system(exercise.toy, SCHEDULE)
    start = time.process_time()
    candidates = candidates_of(system, exercise, 8192, seed=1)
    places, energy = candidates.batch.state.positions, candidates.reduced_energy
    assert places is not None and energy is not None
    network = learn(system, exercise, candidates)
    seconds = time.process_time() - start
    width = exercise.toy.dimension
    score_fn = score_of(log_density_of(system, network), system.composition)
    found = histogram(samples_of(system, score_fn, 20_000, 100)[:, :width], exercise)
    crude = histogram(system.coordinates(places)[:, :width], exercise)
    exact = exact_histogram(exercise)
    zero = float((system.reduced_energy(places) - energy).mean())
    error = abs(log_z_of(system, network) - zero - system.log_z)
    return [
        at_most(f"{exercise.name}: energy alone, JS to the exact density", jensen_shannon(found, exact), "nat", JS_BAR),
        note(f"{exercise.name}: energy alone, error of log Z at the largest noise", error, "nat"),
        note(f"{exercise.name}: JS of the candidates", jensen_shannon(crude, exact), "nat"),
        note(f"{exercise.name}: training", seconds, "CPU s"),
    ]
