"""Molecules that a periodic boundary has cut are put together again, and only moved by box vectors."""

from __future__ import annotations

import numpy as np
import pytest

from dig_scale.simulation.whole import Whole

CUBE = 10.0 * np.eye(3)
SKEWED = np.array([[10.0, 0.0, 0.0], [0.0, 10.0, 0.0], [5.0, 5.0, 7.0710678]])
BONDS = np.array([[0, 1], [1, 2], [2, 3], [0, 3], [4, 5]])
"""A ring of four, and a pair by itself."""
TOGETHER = np.array([[0.0, 0, 0], [1.4, 0, 0], [1.4, 1.4, 0], [0, 1.4, 0], [2.5, 0, 3.0], [3.9, 0, 3.0]])


@pytest.mark.parametrize("box", [CUBE, SKEWED])
def test_any_cut_is_undone(box: np.ndarray) -> None:
    whole = Whole.of(BONDS, 6)
    for seed in range(20):
        cut = TOGETHER + np.random.default_rng(seed).integers(-3, 4, size=(6, 3)) @ box
        mended = whole(cut, box)
        np.testing.assert_allclose(mended - mended[0], TOGETHER - TOGETHER[0], atol=1e-9)
        moved = (mended - cut) @ np.linalg.inv(box)
        np.testing.assert_allclose(moved, np.round(moved), atol=1e-9)


def test_second_molecule_comes_to_its_nearest_image_in_a_skewed_box() -> None:
    """Rounding of fractional coordinates alone leaves these two 0.4 Å further apart than they need be."""
    whole = Whole.of(np.zeros((0, 2), np.int64), 2)
    apart = np.array([[0.0, 0, 0], np.array([0.49, 0.49, 0.49]) @ SKEWED])
    shortest = min(
        np.linalg.norm(apart[1] + np.array([i, j, k]) @ SKEWED)
        for i in range(-2, 3)
        for j in range(-2, 3)
        for k in range(-2, 3)
    )
    mended = whole(apart, SKEWED)
    assert np.linalg.norm(mended[1] - mended[0]) == pytest.approx(shortest)
    assert shortest < np.linalg.norm(apart[1] - apart[0]) - 0.4
