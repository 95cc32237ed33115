"""Rows of benchmarks/physics.py whose scores are exact: densities of toys, guidance and steering of a mixture by a tilt.

Each part gives rows of rows.py; what the library answers is set against closed forms and quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.rows import Row, at_most, note
from dig_scale.batch import Context, Geometry, State
from dig_scale.config import Diffusion
from dig_scale.sampling.flow import Integration
from dig_scale.sampling.guidance import Guide, clean_guide, noised_guide, property_guided
from dig_scale.sampling.integrate import sample
from dig_scale.sampling.likelihood import Exact, Hutchinson, LikelihoodSettings, LogDensity, log_density
from dig_scale.sampling.reweighting import boltzmann_log_weights, log_partition
from dig_scale.sampling.solvers import SOLVERS
from dig_scale.sampling.steering import Run, Steered, Steering, steer
from dig_scale.toy_states import ToySystem, toy_system
from dig_scale.toys import DoubleWell, GaussianMixture, MuellerBrown, Toy

WIDE = Diffusion(schedule="log-linear", noise_min=1e-4, noise_max=1e6)
"""What is left of the noise at t = 0 and of the data at t = 1 shows in no density at 1e-5."""
MODERATE = Diffusion(schedule="log-linear", noise_min=0.02, noise_max=50)
"""Noise as molecules have it, over which probes are compared: their errors grow with log(noise_max)."""
SAMPLED = Diffusion(schedule="log-linear", noise_min=0.02, noise_max=500)
"""With the steps below, on Gaussians of this width, solvers are off by 0.1 % of the variance and less of the mean."""
STATES = 12
DENSITY_BAR = 1e-3
GAUSSIAN_BAR = 1e-5
LOG_Z_BAR = 0.01
PROBES = 1024
PROBED = Integration("rk4", steps=20)
"""Of both traces that are compared."""
MOMENT_BAR = 2.0
GUIDED, GUIDED_STEPS = 100_000, 80
POPULATIONS, WALKERS, STEERED_STEPS = 32, 2000, 120


@dataclass(frozen=True)
class Sum:
    """A toy whose density is summed: bar in nat, tolerance of the integration, and the probes of its estimate.

    Where a toy's Jacobian is diagonal, probes of signs are exact and leave nothing to compare: those are given normal ones.
    """

    name: str
    toy: Toy
    bar: float = DENSITY_BAR
    tolerance: float = 1e-6
    probes: Literal["rademacher", "gaussian"] = "rademacher"


def gaussian(dimension: int) -> GaussianMixture:
    """One Gaussian of 0.6 Å, fp64."""
    means = torch.linspace(-0.7, 0.7, dimension).double() if dimension > 1 else torch.full((1,), 0.7).double()
    return GaussianMixture(means.unsqueeze(0), torch.tensor([0.6]).double(), torch.ones(1).double())


def toys() -> Iterator[Sum]:
    """All toys of the table."""
    for dimension in (1, 3, 22, 66):
        name = f"Gaussian, {dimension} dimension{'s' if dimension > 1 else ''}"
        yield Sum(name, gaussian(dimension), GAUSSIAN_BAR, 1e-8, "gaussian")
    means = torch.tensor([[2.0, 0, 0, 0, 0, 0], [-1.0, 1, 0, 0, 0, 0]]).double()
    mixture = GaussianMixture(means, torch.tensor([0.3, 0.5]).double(), torch.tensor([0.1, 0.9]).double())
    yield Sum("Gaussian mixture, 6 dimensions", mixture)
    yield Sum("double well", DoubleWell(4.0, 1.0), probes="gaussian")
    for kT in (10, 15, 20):
        yield Sum(f"Mueller-Brown, kT {kT}", MuellerBrown(float(kT)))


def toy_rows() -> list[Row]:
    """Densities, normalisers and probes of all toys."""
    return [row for case in toys() for row in rows_of_toy(case)]


def rows_of_toy(case: Sum) -> list[Row]:
    """Log-density and log Z at exact samples; probes against the exact trace, as one number over all samples."""
    system = toy_system(case.toy, WIDE)
    state = _drawn(system)
    path = Integration(rtol=case.tolerance, atol=case.tolerance)
    found = _density(system, state, LikelihoodSettings(path, tolerance=case.bar / 10))
    assert state.positions is not None
    error = float((found.log_density - system.log_density(state.positions)).abs().max())
    weights = boltzmann_log_weights(system.reduced_energy(state.positions).numpy(), found.log_density.numpy())
    apart = abs(log_partition(weights, seed=0).value - system.log_z)
    return [
        at_most(f"{case.name}: largest error of the log-density", error, "nat", case.bar),
        at_most(f"{case.name}: error of log Z", apart, "nat", LOG_Z_BAR),
        *probe_rows(case),
    ]


def probe_rows(case: Sum) -> list[Row]:
    """Mean over samples of the probes' estimate less the exact trace, in standard errors, and that standard error."""
    system = toy_system(case.toy, MODERATE)
    state = _drawn(system)
    exact = _density(system, state, LikelihoodSettings(PROBED, Exact()))
    estimate = _density(system, state, LikelihoodSettings(PROBED, Hutchinson(PROBES, case.probes, seed=5)))
    error = float(estimate.standard_error.square().sum().sqrt()) / STATES
    apart = abs(float((estimate.log_density - exact.log_density).mean()))
    return [
        at_most(f"{case.name}: {PROBES} {case.probes} probes against the exact trace", apart / error, "s.e.", 3),
        note(f"{case.name}: that standard error", error, "nat"),
    ]


def _drawn(system: ToySystem) -> State:
    return system.state(system.toy.sample(STATES, torch.Generator().manual_seed(1)))


def _density(system: ToySystem, state: State, settings: LikelihoodSettings) -> LogDensity:
    return log_density(system.score_fn, system.composition, state, system.context, settings)


MIXTURE = GaussianMixture(
    torch.tensor([[1.5, 0.0, 0.0], [-1.0, 0.5, 0.0]]), torch.tensor([0.4, 0.6]), torch.tensor([0.3, 0.7])
)
ALONE = GaussianMixture(torch.tensor([[0.4, 0.0, 0.0]]), torch.tensor([0.7]), torch.tensor([1.0]))
SLOPE = torch.tensor([0.8, 0.0, 0.0])


def expected_tilt(geometry: Geometry, context: Context, level: Tensor) -> Tensor:
    """log E[exp(SLOPE·x_0) | x_t] [B] of MIXTURE, exact: the posterior of every component is a Gaussian."""
    y, noise = geometry.positions.flatten(1), level.to(geometry.positions)[:, None] ** 2
    total = MIXTURE.std**2 + noise
    share = torch.log(MIXTURE.weights) - 1.5 * torch.log(total)
    share = share - ((y[:, None] - MIXTURE.means) ** 2).sum(-1) / (2 * total)
    mean = (MIXTURE.std[:, None] ** 2 * y[:, None] + noise[:, None] * MIXTURE.means) / total[..., None]
    gained = mean @ SLOPE + 0.5 * MIXTURE.std**2 * noise / total * (SLOPE @ SLOPE)
    return torch.logsumexp(torch.log_softmax(share, 1) + gained, 1)


def along(geometry: Geometry, context: Context) -> Tensor:
    """SLOPE·x [B] of the first site."""
    return geometry.positions[:, 0] @ SLOPE.to(geometry.positions)


def guidance_rows() -> list[Row]:
    """Mean and variance along the tilt, of guided samples, against the tilted mixture's."""
    exact, clean = noised_guide(expected_tilt, lambda value: value), clean_guide(along, lambda value: value)
    by_clean = _guided(MIXTURE, clean, GUIDED // 5)
    mean, variance = moments(MIXTURE.tilted(SLOPE))
    plain = moments(MIXTURE)
    return [
        note("guidance, mixture: mean without guidance", plain[0], "Å"),
        note("guidance, mixture: mean of the exact tilt", mean, "Å"),
        *_moment_rows("guidance, mixture by the exact log q(c | x_t)", MIXTURE, _guided(MIXTURE, exact, GUIDED)),
        *_moment_rows("guidance, Gaussian by its clean estimate (exact there)", ALONE, _guided(ALONE, clean, GUIDED)),
        note("guidance, mixture by its clean estimate: error of the mean", _off(float(by_clean.mean()), mean), "%"),
        note(
            "guidance, mixture by its clean estimate: error of the variance", _off(float(by_clean.var()), variance), "%"
        ),
    ]


def moments(mixture: GaussianMixture) -> tuple[float, float]:
    """Exact mean (Å) and variance (Å²) of the first coordinate."""
    means, variances, weights = mixture.means[:, 0].double(), mixture.std.double() ** 2, mixture.weights.double()
    mean = weights @ means
    return float(mean), float(weights @ (variances + means**2) - mean**2)


def _guided(mixture: GaussianMixture, guide: Guide, count: int) -> Tensor:
    """First coordinates of `count` samples of the probability-flow ODE."""
    toy = toy_system(mixture, SAMPLED)
    score_fn, solver = property_guided(toy.score_fn, toy.composition, [guide]), SOLVERS["dpm-solver++2m-ode"]
    parts = []
    for index in torch.arange(count).split(20_000):
        found = sample(score_fn, toy.composition, toy.context, solver, GUIDED_STEPS, 7, index).positions
        assert found is not None
        parts.append(found[:, 0, 0].double())
    return torch.cat(parts)


def _moment_rows(name: str, mixture: GaussianMixture, x: Tensor) -> list[Row]:
    mean, variance = moments(mixture.tilted(SLOPE))
    square = (x - x.mean()) ** 2
    return [
        at_most(f"{name}: error of the mean", _off(float(x.mean()), mean), "%", MOMENT_BAR),
        at_most(f"{name}: error of the variance", _off(float(x.var()), variance), "%", MOMENT_BAR),
        note(f"{name}: standard error of the mean", 100 * math.sqrt(variance / len(x)) / abs(mean), "%"),
        note(f"{name}: standard error of the variance", 100 * float(square.std()) / variance / math.sqrt(len(x)), "%"),
    ]


def _off(found: float, exact: float) -> float:
    return 100 * abs(found / exact - 1)


MEASURES = ("mean", "second moment", "share above 0.5 Å")
"""Of the first coordinate."""


def steering_rows() -> list[Row]:
    """Weighted averages over independent populations, whose spread is the standard error."""
    toy = toy_system(MIXTURE, SAMPLED)
    populations = [_population(toy, Steering(), k) for k in range(POPULATIONS)]
    at_end = _population(toy, Steering(resample_below=0.0), 0)
    tilted = torch.tensor([_averages(one, one.log_weights) for one in populations])
    plain = torch.tensor([_averages(one, one.log_weights_unsteered) for one in populations])
    logs = torch.tensor([[one.log_normaliser] for one in populations])
    share = [float(one.ess[-1]) / WALKERS for one in populations]
    return [
        *_agreement("steering, tilted mixture", MEASURES, tilted, _expected(MIXTURE.tilted(SLOPE))),
        *_agreement("steering, tilted mixture", ("log normaliser",), logs, [log_normaliser()]),
        *_agreement("steering, tilt taken back", MEASURES, plain, _expected(MIXTURE)),
        note(
            f"steering: effective samples at the end of {WALKERS}, mean of populations",
            100 * sum(share) / len(share),
            "%",
        ),
        note("steering: the same without resampling", 100 * float(at_end.ess[-1]) / WALKERS, "%"),
        note("steering: fewest effective samples on the way", min(float(one.ess.min()) for one in populations)),
        note("steering: resamplings per population", sum(len(one.resampled) for one in populations) / POPULATIONS),
    ]


def log_normaliser() -> float:
    """log E[exp(SLOPE·x)] of MIXTURE."""
    gained = MIXTURE.means @ SLOPE + 0.5 * MIXTURE.std**2 * (SLOPE @ SLOPE)
    return float(torch.logsumexp(torch.log(MIXTURE.weights) + gained, 0))


def _population(toy: ToySystem, settings: Steering, number: int) -> Steered:
    index = number * WALKERS + torch.arange(WALKERS)
    run = Run(SOLVERS["dpm-solver++2m-sde"], STEERED_STEPS, 7, index)
    return steer(toy.score_fn, toy.composition, toy.context, lambda g, c: -along(g, c), settings, run)


def _averages(found: Steered, log_weights: Tensor) -> list[float]:
    assert found.state.positions is not None
    x, w = found.state.positions[:, 0, 0].double(), torch.softmax(log_weights, 0)
    return [float(w @ values) for values in (x, x**2, (x > 0.5).double())]


def _expected(mixture: GaussianMixture) -> list[float]:
    """MEASURES, exact."""
    mean, variance = moments(mixture)
    z = (0.5 - mixture.means[:, 0].double()) / mixture.std.double()
    return [mean, variance + mean**2, float(mixture.weights.double() @ torch.special.ndtr(-z))]


def _agreement(name: str, measures: tuple[str, ...], found: Tensor, exact: list[float]) -> list[Row]:
    """Errors of the mean over populations [P, M], in standard errors, beside the standard errors."""
    rows = []
    for k, measure in enumerate(measures):
        error = float(found[:, k].std()) / math.sqrt(len(found))
        apart = abs(float(found[:, k].mean()) - exact[k])
        rows.append(at_most(f"{name}: {measure}", apart / error, "s.e.", 3))
        rows.append(note(f"{name}: {measure}, standard error of {exact[k]:.3f}", error))
    return rows
