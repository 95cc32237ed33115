"""Divergence and bootstrap against closed forms: scipy, the noise of a finite sample, the error of an AR(1) mean."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import norm

from dig_scale.evaluation import distribution
from tests.dig_scale.evaluation.conftest import autoregressive


def test_divergence_of_equal_histograms_is_zero_whatever_their_size() -> None:
    histogram = np.array([3.0, 0.0, 5.0, 2.0])
    assert distribution.jensen_shannon(histogram, 7 * histogram) == 0.0


def test_divergence_of_disjoint_histograms_is_ln_2() -> None:
    assert distribution.jensen_shannon(np.array([2, 1, 0, 0]), np.array([0, 0, 4, 9])) == pytest.approx(np.log(2))


def test_divergence_is_the_square_of_scipy_distance() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.poisson(2.0, size=(2, 40))
    expected = jensenshannon(first, second) ** 2
    assert distribution.jensen_shannon(first, second) == pytest.approx(expected, rel=1e-12)
    assert distribution.jensen_shannon(second, first) == pytest.approx(expected, rel=1e-12)


def test_divergence_of_an_empty_histogram_is_refused() -> None:
    with pytest.raises(ValueError, match="without counts"):
        distribution.jensen_shannon(np.zeros(4), np.ones(4))


def test_two_samples_of_a_gaussian_score_the_expected_noise() -> None:
    n, m, n_bins = 3000, 12_000, 30
    edges = norm.ppf(np.linspace(0, 1, n_bins + 1)[1:-1])  # bins of equal probability: all are occupied
    generator = np.random.default_rng(1)

    def histogram(size: int) -> np.ndarray:
        return np.bincount(np.searchsorted(edges, generator.normal(size=size)), minlength=n_bins)

    scores = [distribution.jensen_shannon(histogram(n), histogram(m)) for _ in range(400)]
    expected = (n_bins - 1) / 8 * (1 / n + 1 / m)
    # One score has a relative width of sqrt(2 / 29); the mean of 400 is good to 1.3 %, and the expansion to about 1/n.
    assert np.mean(scores) == pytest.approx(expected, rel=0.05)


def test_noise_floor_is_that_of_a_sample_of_its_size() -> None:
    histogram = np.full(30, 400.0)
    floor = distribution.resampled_divergence(histogram, 3000, 400, np.random.default_rng(2))
    assert floor == pytest.approx(29 / 8 / 3000, rel=0.05)


def test_block_bootstrap_gives_the_error_of_a_correlated_mean() -> None:
    r, n = 0.9, 40_000
    errors = []
    for seed in range(6):
        series = autoregressive(r, n, seed)
        blocks = distribution.block_resampling(np.zeros(n, int), 190, 400, np.random.default_rng(seed))
        errors.append(blocks.means(series, np.ones(n)).std(ddof=1))
    expected = np.sqrt((1 + r) / (1 - r) / n)  # of the mean of an AR(1) process of unit variance
    # Blocks of ten inefficiencies lose 3 %, 210 blocks and 400 replicates leave 2.5 % of noise on the mean of six.
    assert np.mean(errors) == pytest.approx(expected, rel=0.12)


def test_bootstrap_by_frame_would_miss_the_correlation() -> None:
    n = 40_000
    series = autoregressive(0.9, n, 0)
    blocks = distribution.block_resampling(np.zeros(n, int), 1, 200, np.random.default_rng(0))
    assert blocks.means(series, np.ones(n)).std() == pytest.approx(1 / np.sqrt(n), rel=0.15)


def test_no_block_spans_two_trajectories() -> None:
    trajectory = np.repeat([0, 1, 2], [95, 7, 40])
    blocks = distribution.block_resampling(trajectory, 10, 5, np.random.default_rng(0))
    for block in range(blocks.n_blocks):
        assert len(set(trajectory[blocks.block_of_frame == block])) == 1
    lengths = np.bincount(blocks.block_of_frame)
    assert len(lengths) == blocks.n_blocks == 10 + 1 + 4
    assert lengths.min() >= 7
    assert (blocks.draws.sum(axis=1) == blocks.n_blocks).all()


def test_bootstrap_of_independent_samples_gives_the_binomial_error() -> None:
    n, p = 20_000, 0.1
    values = (np.random.default_rng(3).random(n) < p).astype(float)
    blocks = distribution.independent_resampling(n, 1000, np.random.default_rng(4))
    assert blocks.n_blocks == distribution.MAX_BLOCKS
    assert blocks.means(values, np.ones(n)).std() == pytest.approx(np.sqrt(p * (1 - p) / n), rel=0.1)


def test_replicate_histograms_hold_what_the_draws_say() -> None:
    bins = np.array([0, 1, 1, 2, 2, 2])
    blocks = distribution.Resampling(np.array([0, 0, 1, 1, 2, 2]), np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]]), 2)
    assert blocks.counts(bins, 3).tolist() == [[2, 3, 1], [0, 0, 6]]


def test_bins_wrap_at_pi() -> None:
    assert distribution.circular_bins(np.array([-np.pi, np.pi, 0.0]), 36).tolist() == [0, 0, 18]
    single = np.array([-np.pi, np.pi], dtype=np.float32)  # a little beyond pi on both sides
    assert set(distribution.circular_bins(single, 36).tolist()) <= {0, 35}
    assert distribution.linear_bins(np.array([-5.0, 0.0, 0.99, 1.0, 9.0]), 0, 1, 4).tolist() == [0, 0, 3, 3, 3]


def test_free_energy_of_a_bin_is_minus_log_of_its_share() -> None:
    energy = distribution.free_energy(np.array([8.0, 2.0, 0.0]))
    assert energy[1] - energy[0] == pytest.approx(np.log(4))
    assert np.isnan(energy[2])
