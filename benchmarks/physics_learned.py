"""Müller-Brown's potential with a score learned from exact samples: rows of benchmarks/physics.py.

A plain multilayer perceptron is trained by the project's denoising objective and stands behind the same Composition as any
molecule's network. Its own samples and their log p come from one probability-flow ODE, so that on them the mean of
-V/kT - log p is log Z less the divergence of the model from the truth, and on exact samples log Z plus that the other way
round; both differences are given with their sign.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.rows import Row, at_least, at_most, note
from benchmarks.toy_networks import FourierPerceptron, trained
from dig_scale.batch import Batch, Context, Geometry, Score, ScoreFn, State
from dig_scale.config import Diffusion
from dig_scale.objectives.denoising import denoising_loss, draw_times
from dig_scale.sampling.flow import Integration, from_latent
from dig_scale.sampling.likelihood import LikelihoodSettings, log_density
from dig_scale.toy_states import ToySystem, toy_system
from dig_scale.toys import MuellerBrown

KT = 15.0
SCHEDULE = Diffusion(schedule="log-linear", noise_min=0.01, noise_max=50.0)
FRAMES = 100_000
"""Exact samples that the network learns from."""
STEPS, BATCH = 4000, 1024
DRAWN, WEIGHED = 20_000, 4000
"""Samples whose basins are counted, and those of them whose densities are taken."""
INTEGRATION = Integration(rtol=1e-4, atol=1e-4)
MINIMA = ((-0.558, 1.442), (-0.050, 0.467), (0.623, 0.028))
CORNER, SPACING, CELLS = -2.5, 0.01, 551
"""Å; of the grid on which basins are told apart, in both coordinates."""
POPULATION_BAR = 0.02
BELOW, ABOVE = -0.1, 0.01
"""nat; how far the mean of -V/kT - log p may be from log Z."""


class ToyScore(nn.Module):
    """Multilayer perceptron for the answers of order 1 to a toy's noised coordinates, a Network of one site.

    The toy's own coordinates, `mean` and `variance` [d], enter scaled and as Fourier features that noise damps as it damps
    the density; the coordinates behind them are standard normals, whose answer is 0.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)
        self.net = FourierPerceptron(len(mean), len(mean) + 1, len(mean), width=128)

    def forward(self, geometry: Geometry, context: Context, noise: Tensor) -> Score:
        """Answers [B, 1, 3]."""
        level = noise.unsqueeze(1).to(self.mean)
        own = geometry.positions[:, 0, : len(self.mean)].to(self.mean) - self.mean
        scaled = own / torch.sqrt(self.variance + level**2)
        answer = self.net(own, level**2, torch.cat([scaled, 0.25 * torch.log(level)], dim=1))
        found = nn.functional.pad(answer, (0, 3 - len(self.mean)))
        return Score(positions=found.unsqueeze(1).to(geometry.positions))


def learned(system: ToySystem, own: Tensor) -> ScoreFn:
    """The score of a network trained on exact samples [S, d] of the toy."""
    generator = torch.Generator().manual_seed(0)
    frames = system.state(
        torch.cat([own, torch.randn(len(own), 3 - own.shape[1], generator=generator)], dim=1)
    ).positions
    assert frames is not None
    network = ToyScore(own.mean(0), own.var(0))

    def loss_of(_step: int) -> Tensor:
        rows = torch.randint(len(frames), (BATCH,), generator=generator)
        batch = Batch(State(frames[rows]), system.context, ("Mueller-Brown",))
        t = draw_times(BATCH, "antithetic", generator)
        normals = torch.randn(BATCH, system.composition.normals(system.context), generator=generator)
        noise = system.composition.noise(normals, system.context)
        return denoising_loss(network, system.composition, batch, t, noise).mean()

    averaged = trained(network, loss_of, STEPS, average=0.998)
    return system.composition.as_score_fn(averaged.requires_grad_(False))


def own_samples(system: ToySystem, score_fn: ScoreFn, count: int) -> State:
    """Samples of the probability-flow ODE, whose density is the one that is integrated."""
    normals = torch.randn(count, system.toy.dimension, generator=torch.Generator().manual_seed(3))
    prior = system.composition.prior(system.composition.noise(normals, system.context))
    return from_latent(score_fn, system.composition, prior, system.context, INTEGRATION)


def log_weights_of(system: ToySystem, score_fn: ScoreFn, state: State) -> Tensor:
    """-V/kT - log p [B], nat, by the exact divergence."""
    assert state.positions is not None
    settings = LikelihoodSettings(INTEGRATION, tolerance=1e-3)
    found = log_density(score_fn, system.composition, state, system.context, settings).log_density
    return -system.reduced_energy(state.positions.double()) - found


@dataclass(frozen=True)
class Basins:
    """Which minimum of MINIMA, `number` [cells, cells], every cell of a square grid belongs to, and the exact `shares` [3]."""

    number: Tensor
    shares: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Numbers [S] of the basins of points [S, 2]; points off the grid count at its edge."""
        place = ((x.double() - CORNER) / SPACING).round().long().clamp(0, len(self.number) - 1)
        return self.number[place[:, 0], place[:, 1]]


def basins_of(toy: MuellerBrown) -> Basins:
    """Every cell goes to the lowest of its neighbours until there is none lower, and then to the minimum nearest to there."""
    axis = CORNER + SPACING * torch.arange(CELLS, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    energy = toy.reduced_energy(points)
    lowest = nn.functional.max_pool2d(-energy.view(1, 1, CELLS, CELLS), 3, 1, 1, return_indices=True)[1].flatten()
    for _ in range(math.ceil(math.log2(CELLS**2))):
        lowest = lowest[lowest]
    number = torch.cdist(points[lowest], torch.tensor(MINIMA, dtype=torch.float64)).argmin(1)
    shares = torch.zeros(len(MINIMA), dtype=torch.float64).index_add_(0, number, torch.softmax(-energy, 0))
    return Basins(number.view(CELLS, CELLS), shares)


def mueller_brown_rows() -> list[Row]:
    """Train, sample, and judge."""
    toy = MuellerBrown(KT)
    system, start = toy_system(toy, SCHEDULE), time.process_time()
    score_fn = learned(system, toy.sample(FRAMES, torch.Generator().manual_seed(1)).float())
    seconds = time.process_time() - start
    drawn = own_samples(system, score_fn, DRAWN).positions
    assert drawn is not None
    fresh = system.toy.sample(WEIGHED, torch.Generator().manual_seed(2)).float()
    return [
        note("Mueller-Brown learned: training", seconds, "CPU s"),
        note("Mueller-Brown learned: exact log Z", system.log_z, "nat"),
        *_bound_rows(system, score_fn, State(drawn[:WEIGHED]), system.state(fresh)),
        *_population_rows(toy, drawn[:, 0, :2]),
    ]


def _bound_rows(system: ToySystem, score_fn: ScoreFn, own: State, exact: State) -> list[Row]:
    ours, theirs = (log_weights_of(system, score_fn, state) - system.log_z for state in (own, exact))
    name = "Mueller-Brown learned: mean of (-V/kT - log p) - log Z"
    return [
        at_least(f"{name}, the model's samples, from below", float(ours.mean()), "nat", BELOW),
        at_most(f"{name}, the model's samples, from above", float(ours.mean()), "nat", ABOVE),
        note(f"{name}, the model's samples: standard error", float(ours.std()) / math.sqrt(len(ours)), "nat"),
        note(f"{name}, exact samples", float(theirs.mean()), "nat"),
        note(f"{name}, exact samples: standard error", float(theirs.std()) / math.sqrt(len(theirs)), "nat"),
    ]


def _population_rows(toy: MuellerBrown, drawn: Tensor) -> list[Row]:
    basins = basins_of(toy)
    exact, found = basins.shares, torch.bincount(basins.of(drawn), minlength=len(MINIMA)).double() / len(drawn)
    error = float((found * (1 - found) / len(drawn)).sqrt().max())
    rows = [
        note(f"Mueller-Brown learned: basin of ({x:.2f}, {y:.2f}), exact", float(exact[k]))
        for k, (x, y) in enumerate(MINIMA)
    ]
    rows += [
        note(f"Mueller-Brown learned: basin of ({x:.2f}, {y:.2f}), samples", float(found[k]))
        for k, (x, y) in enumerate(MINIMA)
    ]
    return [
        *rows,
        at_most(
            "Mueller-Brown learned: largest error of a basin's share",
            float((found - exact).abs().max()),
            "",
            POPULATION_BAR,
        ),
        note("Mueller-Brown learned: its standard error", error),
    ]
