"""Umbrella windows against exact answers: populations, profiles and free energies of two wells, and what errors are worth."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dig_scale.batch import Context, Geometry
from dig_scale.config import Diffusion
from dig_scale.errors import UserError
from dig_scale.sampling.collective_variables import Property
from dig_scale.sampling.reweighting import Estimate, free_energy_difference, multistate, weighted_average
from dig_scale.sampling.solvers import SOLVERS
from dig_scale.sampling.steering import Run, Steered, Steering, bias_of, steer
from dig_scale.sampling.umbrella import LEAST_OVERLAP, Combined, Window, combined, neighbours
from dig_scale.toy_states import toy_system
from dig_scale.toys import GaussianMixture

WELLS, WIDTH, SHARES = np.array([-1.0, 1.0]), 0.4, np.array([0.3, 0.7])
CENTRES, SPREAD = (-1.5, -0.75, 0.0, 0.75, 1.5), 0.6
POPULATIONS, WALKERS, STEPS = 6, 150, 50
SOLVER_ERROR = 0.03
"""kT, of 50 steps; the exact answers are of the density itself."""
TOY = toy_system(
    GaussianMixture(
        torch.tensor([[WELLS[0], 0, 0], [WELLS[1], 0, 0]], dtype=torch.float32),
        torch.full((2,), WIDTH),
        torch.tensor(SHARES, dtype=torch.float32),
    ),
    Diffusion(schedule="power", noise_min=0.02, noise_max=100),
)


def harmonic(centre: float) -> Property:
    def potential(geometry: Geometry, context: Context) -> Tensor:
        return ((geometry.positions[:, 0, 0] - centre) / SPREAD) ** 2 / 2

    return potential


def biases(x: np.ndarray, centres: tuple[float, ...] = CENTRES) -> np.ndarray:
    return ((x - np.array(centres)[:, None]) / SPREAD) ** 2 / 2


def exact_free_energies(centres: tuple[float, ...] = CENTRES) -> np.ndarray:
    """-log of the mean of exp(-b) over the mixture, in closed form."""
    variance, c = WIDTH**2 + SPREAD**2, np.array(centres)[:, None]
    return np.asarray(
        -np.log((SHARES * np.exp(-((c - WELLS) ** 2) / 2 / variance)).sum(1) * SPREAD / math.sqrt(variance))
    )


def mass(low: float, high: float) -> float:
    return float(SHARES @ (stats.norm.cdf(high, WELLS, WIDTH) - stats.norm.cdf(low, WELLS, WIDTH)))


@pytest.fixture(scope="module")
def populations() -> list[list[Steered]]:
    """Of each window, steered by the library."""
    return [
        [
            steer(
                TOY.score_fn,
                TOY.composition,
                TOY.context,
                harmonic(centre),
                Steering(),
                Run(SOLVERS["dpm-solver++2m-sde"], STEPS, seed, k * WALKERS + torch.arange(WALKERS)),
            )
            for k in range(POPULATIONS)
        ]
        for seed, centre in enumerate(CENTRES)
    ]


@pytest.fixture(scope="module")
def x(populations: list[list[Steered]]) -> np.ndarray:
    """First coordinate of all samples, window by window."""
    found = [one.state.positions[:, 0, 0].numpy() for window in populations for one in window]  # type: ignore[index]
    return np.concatenate(found).astype(np.float64)


@pytest.fixture(scope="module")
def windows(populations: list[list[Steered]]) -> list[Window]:
    return [
        Window(
            f"at {centre:g}",
            np.concatenate([one.log_weights.numpy() for one in window]),
            np.repeat(np.arange(POPULATIONS), WALKERS),
            sum(one.distinct for one in window),
            (seed,),
        )
        for seed, (centre, window) in enumerate(zip(CENTRES, populations, strict=True))
    ]


@pytest.fixture(scope="module")
def whole(windows: list[Window], x: np.ndarray) -> Combined:
    return combined(windows, biases(x))


def within(found: Estimate, exact: float, largest_error: float, what: object = "") -> None:
    assert 0 < found.error < largest_error, (what, found)
    assert abs(found.value - exact) < 3 * found.error + SOLVER_ERROR, (what, found, exact)


def test_the_wells_have_their_populations(whole: Combined, x: np.ndarray) -> None:
    found = free_energy_difference(x < 0, x > 0, whole.log_weights, 1, whole.replicates)
    within(found, math.log(mass(-9, 0) / mass(0, 9)), 0.25)
    raw = np.log((x < 0).sum() / (x > 0).sum())
    assert abs(raw - found.value) > 3 * found.error  # the windows as they are would not do


def test_the_free_energy_profile_is_the_exact_one(whole: Combined, x: np.ndarray) -> None:
    edges = np.arange(-1.75, 1.76, 0.5)
    deepest = (x > 0.75) & (x < 1.25)
    for low, high in pairwise(edges):
        inside = (x > low) & (x < high)
        if low != 0.75:
            found = free_energy_difference(deepest, inside, whole.log_weights, 1, whole.replicates)
            within(found, math.log(mass(0.75, 1.25) / mass(low, high)), 0.35, low)


def test_windows_have_their_free_energies_and_overlap_with_the_next(whole: Combined) -> None:
    for value, error, exact in zip(whole.free_energies, whole.errors, exact_free_energies(), strict=True):
        within(Estimate(value, error), exact, 0.25)
    np.testing.assert_allclose(whole.overlap.sum(1), 1, atol=1e-6)
    assert {tuple(sorted((one.first, one.second))) for one in neighbours(whole.overlap)} == {
        (k, k + 1) for k in range(len(CENTRES) - 1)
    }
    assert min(one.overlap for one in neighbours(whole.overlap)) > LEAST_OVERLAP
    assert np.exp(whole.log_weights).mean() == pytest.approx(1)


def test_a_bias_evaluated_again_is_the_one_that_steered(populations: list[list[Steered]]) -> None:
    for centre, window in zip(CENTRES, populations, strict=True):
        positions = window[0].state.positions
        assert positions is not None
        again = bias_of(Geometry(positions), TOY.context, harmonic(centre), Steering())
        assert torch.allclose(again, window[0].bias)


# --- drawn directly, so that what is expected is known ---------------------------------------------------------------


def drawn(centre: float, count: int, generator: np.random.Generator) -> np.ndarray:
    """Independent samples of the mixture tilted by a window, itself a mixture."""
    variance = WIDTH**2 + SPREAD**2
    shares = SHARES * np.exp(-((centre - WELLS) ** 2) / 2 / variance)
    which = generator.choice(2, count, p=shares / shares.sum())
    mean = (WELLS * SPREAD**2 + centre * WIDTH**2) / variance
    return generator.normal(mean[which], WIDTH * SPREAD / math.sqrt(variance))


def test_windows_of_equal_weights_are_what_pymbar_makes_of_them() -> None:
    generator = np.random.default_rng(0)
    x = np.concatenate([drawn(centre, 200, generator) for centre in CENTRES])
    found = combined([Window("w", np.zeros(200), stream=(k,)) for k in range(len(CENTRES))], biases(x))
    energies = np.concatenate([np.zeros((1, len(x))), biases(x)])
    plain = multistate(energies, np.array([0, *[200] * len(CENTRES)]))
    np.testing.assert_allclose(found.free_energies, plain.differences[0, 1:], atol=1e-5)
    np.testing.assert_allclose(found.log_weights - np.log(len(x)), plain.log_weights[0], atol=1e-5)
    np.testing.assert_allclose(found.overlap, plain.overlap[1:, 1:], atol=1e-5)
    np.testing.assert_allclose(found.errors, plain.errors[0, 1:], rtol=0.4)  # of 50 replicates


def test_a_window_of_uneven_weights_counts_as_what_it_is_worth() -> None:
    """Half of its samples are from elsewhere and weigh next to nothing: no more than those left out."""
    generator = np.random.default_rng(1)
    parts = [drawn(centre, 100, generator) for centre in CENTRES]
    stray = np.full(100, 2.5)
    populations = np.zeros(100, np.int64)
    even = [Window("w", np.zeros(100), populations, stream=(k,)) for k in range(5)]
    uneven = [
        replace(
            even[0], log_weights=np.r_[np.zeros(100), np.full(100, -40.0)], population=np.r_[populations, populations]
        )
    ]
    first = combined(even, biases(np.concatenate(parts)))
    second = combined([*uneven, *even[1:]], biases(np.concatenate([parts[0], stray, *parts[1:]])))
    np.testing.assert_allclose(first.free_energies, second.free_energies, atol=1e-6)
    assert np.exp(second.log_weights)[100:200].sum() < 1e-9


def test_samples_as_they_are_need_no_weights() -> None:
    x = np.random.default_rng(2).normal(size=50)
    found = combined([Window("plain", np.zeros(50))], np.zeros((1, 50)))
    assert np.abs(found.log_weights).max() < 1e-12
    assert found.free_energies.tolist() == [0.0]
    assert found.replicates is not None
    error = weighted_average(x, found.log_weights, 1, found.replicates).error
    assert error == pytest.approx(x.std(ddof=1) / math.sqrt(50), rel=0.35)


def test_errors_are_those_of_populations_and_not_of_samples() -> None:
    """Samples of one population are all alike here; 50 replicates tell an error to 10 %."""
    values = np.random.default_rng(3).normal(size=6)
    window = Window("w", np.zeros(600), np.repeat(np.arange(6), 100), stream=(5,))
    found = combined([window], np.zeros((1, 600)))
    estimate = weighted_average(np.repeat(values, 100), found.log_weights, 1, found.replicates)
    assert estimate.error == pytest.approx(values.std(ddof=1) / math.sqrt(6), rel=0.35)
    assert weighted_average(np.repeat(values, 100), found.log_weights, 1).error < 0.2 * estimate.error


def test_one_population_has_asymptotic_errors_of_its_distinct_ancestors() -> None:
    generator = np.random.default_rng(4)
    bias = biases(np.concatenate([drawn(centre, 400, generator) for centre in CENTRES]))
    alone = [Window("w", np.zeros(400), np.zeros(400, np.int64), 400, (k,)) for k in range(5)]
    found = combined(alone, bias)
    assert found.replicates is None
    few = combined([replace(one, distinct=100) for one in alone], bias)
    np.testing.assert_allclose(few.errors, 2 * found.errors, rtol=0.05)
    np.testing.assert_allclose(few.free_energies, found.free_energies)


def test_a_gap_shows_between_the_windows_beside_it() -> None:
    centres, number = (-2.5, -2.0, 2.0, 2.5), np.repeat(np.arange(4), 60)
    generator = np.random.default_rng(5)
    x = np.concatenate([drawn(centre, 60, generator) for centre in centres])
    kept = np.abs(x) > 1.2
    windows = [
        Window("w", np.zeros((number[kept] == k).sum()), np.zeros((number[kept] == k).sum(), int)) for k in range(4)
    ]
    found = combined(windows, biases(x[kept], centres))
    (gap,) = [one for one in neighbours(found.overlap) if one.overlap < LEAST_OVERLAP]
    assert gap.first in (0, 1) and gap.second in (2, 3)
    assert np.isnan(found.errors).all()
    assert np.isfinite(found.log_weights).all()


def test_biases_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="shape"):
        combined([Window("w", np.zeros(3))], np.zeros((1, 4)))
