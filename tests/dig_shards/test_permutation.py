"""The permutation is a bijection for every size, differs per epoch, and never changes."""

from __future__ import annotations

import numpy as np
import pytest
from dig_shards import ShardError, permute


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 4096, 65537, 100003])
def test_every_index_appears_once(n):
    np.testing.assert_array_equal(np.sort(permute(np.arange(n), n, seed=n, epoch=1)), np.arange(n))


def test_large_domains_stay_inside_and_injective():
    rng = np.random.default_rng(0)
    for n in (2**31 + 11, 10**12, 2**62):
        index = np.unique(rng.integers(0, n, 5000))
        image = permute(index, n, seed=1, epoch=0)
        assert image.min() >= 0
        assert image.max() < n
        assert len(np.unique(image)) == len(index)


def test_epochs_and_seeds_give_different_orders():
    orders = {tuple(permute(np.arange(50), 50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_one_by_one_equals_all_at_once():
    whole = permute(np.arange(37), 37, 5, 2)
    assert [int(permute(np.array(i), 37, 5, 2)) for i in range(37)] == whole.tolist()


@pytest.mark.parametrize("n", [5, 6, 100])
def test_images_are_uniform_over_seeds(n):
    images = np.array([permute(np.arange(2), n, seed, 0) for seed in range(3000)])
    for column in images.T:
        counts = np.bincount(column, minlength=n)
        expected = 3000 / n
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        # Mean n - 1, standard deviation sqrt(2 (n - 1)): five of them is a false alarm in about a million.
        assert chi_squared < (n - 1) + 5 * np.sqrt(2 * (n - 1)) + 5


def test_neighbours_are_torn_apart():
    image = permute(np.arange(10000), 10000, 0, 0)
    # For a random permutation the mean step is n / 3; its standard error over 10^4 steps is below 1%.
    assert np.abs(np.diff(image)).mean() == pytest.approx(10000 / 3, rel=0.05)


def test_order_is_frozen_for_resumable_runs():
    assert permute(np.arange(10), 10, seed=7, epoch=3).tolist() == [6, 5, 2, 7, 0, 1, 3, 4, 9, 8]


@pytest.mark.parametrize(("index", "n"), [([0], 0), ([5], 5), ([-1], 5)])
def test_arguments_outside_the_domain_are_refused(index, n):
    with pytest.raises(ShardError):
        permute(np.array(index), n, 0, 0)
