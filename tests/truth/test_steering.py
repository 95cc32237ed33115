"""Steering against exact answers: weighted averages of a tilted mixture, its normaliser, and what resampling must keep."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dig_scale.batch import Context, Geometry
from dig_scale.config import Diffusion
from dig_scale.errors import UserError
from dig_scale.sampling.integrate import sample
from dig_scale.sampling.solvers import SOLVERS
from dig_scale.sampling.steering import Run, Steered, Steering, effective_sample_size, steer, systematic_resampling
from dig_scale.toy_states import toy_system
from dig_scale.toys import GaussianMixture

MIXTURE = GaussianMixture(
    torch.tensor([[1.5, 0.0, 0.0], [-1.0, 0.5, 0.0]]), torch.tensor([0.4, 0.6]), torch.tensor([0.2, 0.8])
)
SLOPE = torch.tensor([1.2, 0.0, 0.0])
TOY = toy_system(MIXTURE, Diffusion(schedule="power", noise_min=0.02, noise_max=100))
POPULATIONS, WALKERS, STEPS = 10, 500, 40


def down(geometry: Geometry, context: Context) -> Tensor:
    """U of the tilt exp(slope·x)."""
    return -geometry.positions[:, 0] @ SLOPE.to(geometry.positions)


def steered(settings: Steering, first: int = 0, solver: str = "dpm-solver++2m-sde", walkers: int = WALKERS) -> Steered:
    run = Run(SOLVERS[solver], STEPS, 7, first + torch.arange(walkers))
    return steer(TOY.score_fn, TOY.composition, TOY.context, down, settings, run)


def averages(found: Steered, log_weights: Tensor) -> list[float]:
    """Weighted mean, second moment and share above 0.5 of the first coordinate."""
    x, w = found.state.positions[:, 0, 0].double(), torch.softmax(log_weights, 0)
    return [float((w * values).sum()) for values in (x, x**2, (x > 0.5).double())]


def exact(mixture: GaussianMixture) -> list[float]:
    w, m, s = mixture.weights.double(), mixture.means[:, 0].double(), mixture.std.double()
    above = 0.5 * torch.erfc((0.5 - m) / (s * math.sqrt(2)))
    return [float(w @ values) for values in (m, m**2 + s**2, above)]


@pytest.fixture(scope="module")
def populations() -> list[Steered]:
    """Independent of each other, so that they tell the standard error of what all of them agree on."""
    return [steered(Steering(), k * WALKERS) for k in range(POPULATIONS)]


def mean_and_error(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    found = torch.tensor(rows)
    return found.mean(0), found.std(0) / math.sqrt(len(rows))


def test_weighted_averages_are_those_of_the_tilted_mixture(populations: list[Steered]) -> None:
    """Three standard errors, and 0.01 for the steps of the solver and the 1/N of self-normalised averages."""
    mean, error = mean_and_error([averages(one, one.log_weights) for one in populations])
    expected = torch.tensor(exact(MIXTURE.tilted(SLOPE)))
    assert (error < 0.1).all()
    assert ((mean - expected).abs() < 3 * error + 0.01).all(), (mean, expected, error)
    assert any(one.resampled for one in populations)
    for one in populations:
        assert len(one.ess) == STEPS + 1
        assert 1 <= one.ess.min() <= one.ess.max() <= WALKERS + 1e-9


def test_the_mean_weight_is_the_normaliser(populations: list[Steered]) -> None:
    """log Z = log E[exp(slope·x)] of the mixture, in closed form."""
    gained = MIXTURE.means @ SLOPE + 0.5 * MIXTURE.std**2 * (SLOPE @ SLOPE)
    expected = float(torch.logsumexp(torch.log(MIXTURE.weights) + gained, 0))
    mean, error = mean_and_error([[one.log_normaliser] for one in populations])
    assert abs(float(mean) - expected) < 3 * float(error) + 0.02


def test_the_bias_takes_the_tilt_back(populations: list[Steered]) -> None:
    mean, error = mean_and_error([averages(one, one.log_weights_unsteered) for one in populations])
    assert ((mean - torch.tensor(exact(MIXTURE))).abs() < 3 * error + 0.02).all(), (mean, error)
    first = populations[0]
    assert torch.allclose(first.bias, down(Geometry(first.state.positions), TOY.context).double())


def test_without_resampling_walkers_are_plain_samples_with_plain_weights() -> None:
    found = steered(Steering(resample_below=0.0), walkers=100)
    plain = sample(
        TOY.score_fn, TOY.composition, TOY.context, SOLVERS["dpm-solver++2m-sde"], STEPS, 7, torch.arange(100)
    )
    assert torch.allclose(found.state.positions, plain.positions)
    assert torch.allclose(found.log_weights, -found.bias)
    assert found.distinct == 100
    assert float(found.ess[-1]) == pytest.approx(float(effective_sample_size(-found.bias)))


def test_a_population_repeats_and_copies_part_again() -> None:
    first, second = (steered(Steering(resample_below=1.0), walkers=64) for _ in range(2))
    assert torch.equal(first.state.positions, second.state.positions)
    assert torch.equal(first.log_weights, second.log_weights)
    assert len(first.resampled) > 5
    assert first.distinct < 64
    assert len(torch.unique(first.state.positions[:, 0, 0])) == 64
    other = steered(Steering(resample_below=1.0), first=1000, walkers=64)
    assert not torch.equal(first.state.positions, other.state.positions)


def test_steering_keeps_more_effective_samples_than_weighting_at_the_end() -> None:
    steep = Steering(strength=2.5)
    weighted = steered(replace(steep, resample_below=0.0))
    found = steered(steep)
    assert float(found.ess[-1]) > 2 * float(weighted.ess[-1])


def test_systematic_resampling_gives_everyone_his_share() -> None:
    weights = torch.tensor([0.5, 0.26, 0.14, 0.1, 0.0], dtype=torch.float64)
    for u in (0.01, 0.5, 0.99):
        counts = torch.bincount(systematic_resampling(torch.log(weights), torch.tensor(u)), minlength=5)
        assert ((counts - 5 * weights).abs() < 1).all()


def test_a_potential_that_fails_for_a_walker_ends_only_that_walker() -> None:
    def broken(geometry: Geometry, context: Context) -> Tensor:
        x = geometry.positions[:, 0, 0]
        return torch.where(x > 0, torch.full_like(x, math.nan), torch.zeros_like(x))

    run = Run(SOLVERS["ancestral"], 20, 7, torch.arange(200))
    found = steer(TOY.score_fn, TOY.composition, TOY.context, broken, Steering(), run)
    weights = torch.softmax(found.log_weights, 0)
    assert torch.isfinite(found.log_weights).all()
    assert float(weights[found.state.positions[:, 0, 0] > 0].sum()) < 1e-6


def test_solvers_without_noise_and_wrong_answers_are_refused() -> None:
    with pytest.raises(UserError, match="draws no noise"):
        steered(Steering(), solver="heun")
    run = Run(SOLVERS["ancestral"], 3, 7, torch.arange(4))
    wrong = lambda geometry, context: geometry.positions  # noqa: E731
    with pytest.raises(UserError, match="one number per sample"):
        steer(TOY.score_fn, TOY.composition, TOY.context, wrong, Steering(), run)
    with pytest.raises(UserError, match="finite"):
        Steering(strength=math.inf)
