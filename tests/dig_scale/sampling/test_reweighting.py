"""Weights of known Gaussians: averages, free energies, log Z and entropy with honest errors; diagnostics that warn in time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dig_scale.errors import UserError
from dig_scale.sampling.reweighting import (
    Diagnosis,
    boltzmann_log_weights,
    diagnose,
    effective_sample_size,
    entropy,
    free_energy_difference,
    generalized_pareto_shape,
    is_trusted,
    log_partition,
    multistate,
    normalised_weights,
    pareto_k,
    sampled_entropy,
    verdict,
    weighted_average,
)

OFFSET = 2.5
"""kT added to the energy of a standard normal: log Z = log sqrt(2 pi) - OFFSET."""


def normal_case(n: int, spread: float = 1.3, shift: float = 0.4, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Samples of a normal N(shift, spread), their log-density, and their reduced energies as standard normals."""
    x = np.random.default_rng(seed).normal(shift, spread, n)
    return x, stats.norm.logpdf(x, shift, spread), 0.5 * x**2 + OFFSET


def test_averages_log_z_and_entropy_are_within_three_errors_that_are_small() -> None:
    x, log_density, energy = normal_case(20_000)
    weights = boltzmann_log_weights(energy, log_density)
    expected = {
        "mean": (weighted_average(x, weights, seed=1), 0.0),
        "square": (weighted_average(x**2, weights, seed=1), 1.0),
        "log Z": (log_partition(weights, seed=1), 0.5 * math.log(2 * math.pi) - OFFSET),
        "entropy": (entropy(energy, weights, seed=1), 0.5 * math.log(2 * math.pi * math.e)),
        "sampled": (sampled_entropy(log_density, seed=1), 0.5 * math.log(2 * math.pi * math.e * 1.3**2)),
    }
    for name, (found, exact) in expected.items():
        assert abs(found.value - exact) < 3 * found.error, name
        assert 0 < found.error < 0.03, name


def test_errors_are_the_spread_over_repetitions() -> None:
    """The spread of 60 repetitions is known to 9 %; bootstrap errors of them to less; 30 % is allowed."""
    found = []
    for seed in range(60):
        _, log_density, energy = normal_case(400, seed=seed)
        found.append(log_partition(boltzmann_log_weights(energy, log_density), seed=seed))
    spread = np.std([estimate.value for estimate in found])
    assert np.mean([estimate.error for estimate in found]) == pytest.approx(spread, rel=0.3)


def test_free_energy_differences_with_and_without_weights() -> None:
    """Right half against left: 0 kT for the standard normal, log(1 - P)/P of the one that was sampled."""
    x, log_density, energy = normal_case(20_000)
    weights = boltzmann_log_weights(energy, log_density)
    reweighted = free_energy_difference(x < 0, x > 0, weights, seed=2)
    raw = free_energy_difference(x < 0, x > 0, None, seed=2)
    right = stats.norm.sf(0, 0.4, 1.3)
    assert abs(reweighted.value) < 3 * reweighted.error
    assert abs(raw.value - math.log((1 - right) / right)) < 3 * raw.error
    assert raw.value < -0.4
    assert max(raw.error, reweighted.error) < 0.05


def test_a_state_without_samples_has_no_free_energy() -> None:
    x = normal_case(50)[0]
    with pytest.raises(UserError, match="second state holds none of the 50"):
        free_energy_difference(x < 100, x > 100, None, seed=0)


def test_kish_counts_equal_weights_fully_and_one_dominant_one_once() -> None:
    assert effective_sample_size(np.full(40, -700.0)) == pytest.approx(40)
    assert effective_sample_size(np.array([0.0] + [-80.0] * 39)) == pytest.approx(1)
    assert normalised_weights(np.array([1e4, 1e4])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("shape", [0.2, 0.7, 1.2])
def test_the_shape_of_generalized_pareto_draws_is_found(shape: float) -> None:
    """5,000 values leave a standard error of about (1 + k)/sqrt(n) = 0.03."""
    draws = stats.genpareto.rvs(shape, scale=3.0, size=5000, random_state=3)
    assert generalized_pareto_shape(draws) == pytest.approx(shape, abs=0.1)


def test_pareto_k_is_that_of_the_ratio_of_two_exponentials() -> None:
    """Weights exp((1 - r) x) of exponential x have tails with k = 1 - r exactly."""
    x = np.random.default_rng(4).exponential(size=20_000)
    for rate in (0.8, 0.4, 0.1):
        assert pareto_k((1 - rate) * x) == pytest.approx(1 - rate, abs=0.15)


def test_pareto_k_does_not_change_with_the_scale_of_weights() -> None:
    log_weights = np.random.default_rng(5).normal(size=2000)
    assert pareto_k(log_weights + 500) == pytest.approx(pareto_k(log_weights))


def test_few_weights_have_no_pareto_k() -> None:
    assert math.isnan(pareto_k(np.zeros(10)))


def test_good_weights_are_trusted_and_the_verdict_names_their_ess() -> None:
    _, log_density, energy = normal_case(5000)
    diagnosis = diagnose(boltzmann_log_weights(energy, log_density))
    assert is_trusted(diagnosis)
    assert "ESS" in verdict(diagnosis) and "do not trust" not in verdict(diagnosis)


def test_bad_weights_are_named_in_words() -> None:
    log_weights = 6 * np.random.default_rng(6).normal(size=2000)
    diagnosis = diagnose(log_weights)
    assert not is_trusted(diagnosis)
    assert diagnosis.fraction < 0.01 and diagnosis.pareto_k > 0.7
    assert verdict(diagnosis).startswith("ESS 0.") and "do not trust" in verdict(diagnosis)


@pytest.mark.parametrize(("fraction", "k", "reason"), [(0.004, 0.3, "ESS is below 1 %"), (0.2, 0.9, "k is above 0.7")])
def test_each_reason_alone_is_enough(fraction: float, k: float, reason: str) -> None:
    diagnosis = Diagnosis(1000, 1000 * fraction, fraction, k)
    assert not is_trusted(diagnosis)
    assert reason in verdict(diagnosis) and f"ESS {100 * fraction:.1f} %" in verdict(diagnosis)


def test_a_clash_weighs_nothing_and_what_is_not_a_number_is_refused() -> None:
    weights = boltzmann_log_weights(np.array([0.0, np.inf, 1.0]), np.zeros(3))
    assert normalised_weights(weights)[1] == 0
    assert math.isfinite(entropy(np.array([0.0, np.inf, 1.0]), weights, seed=0).value)
    with pytest.raises(UserError, match="first: sample 1"):
        boltzmann_log_weights(np.array([0.0, np.nan]), np.zeros(2))
    with pytest.raises(UserError, match="first: sample 0"):
        boltzmann_log_weights(np.zeros(1), np.array([-np.inf]))


def test_several_ensembles_give_the_free_energies_of_harmonic_wells() -> None:
    """Stiffness k has f = log(k)/2 + const; the middle well was never sampled."""
    stiffness = np.array([1.0, 2.0, 4.0])
    generator = np.random.default_rng(7)
    x = np.concatenate([generator.normal(0, 1.0, 3000), generator.normal(0, 0.5, 2000)])
    found = multistate(0.5 * stiffness[:, None] * x**2, np.array([3000, 0, 2000]))
    exact = 0.5 * np.log(stiffness)
    assert np.all(np.abs(found.differences[0] - exact) < 3 * found.errors[0] + 1e-12)
    assert found.errors[0, 1:].max() < 0.05
    middle = np.exp(found.log_weights[1])
    assert middle.sum() == pytest.approx(1)
    assert (middle * x**2).sum() == pytest.approx(0.5, rel=0.1)


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="counts"):
        multistate(np.zeros((2, 5)), np.array([3, 3]))
