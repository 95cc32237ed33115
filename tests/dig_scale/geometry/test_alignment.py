"""Superposition: it undoes rigid motions, never mirrors, and sees weighted sites alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from dig_scale.geometry.alignment import aligned_rmsd, centroid, kabsch, rmsd, superpose


def _cloud(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=5.0, size=(*shape, 3))


def _moved(positions: np.ndarray, seed: int) -> np.ndarray:
    return positions @ Rotation.random(random_state=seed).as_matrix().T + np.array([3.0, -20.0, 7.0])


@pytest.mark.parametrize("n", [3, 4, 17])
def test_rigid_motion_is_undone(n: int) -> None:
    target = _cloud(0, n)
    assert aligned_rmsd(_moved(target, 1), target) == pytest.approx(0.0, abs=1e-9)
    rotation, translation = kabsch(_moved(target, 1), target)
    assert np.allclose(_moved(target, 1) @ rotation.T + translation, target)
    assert np.linalg.det(rotation) == pytest.approx(1.0)


def test_mirror_image_stays_one() -> None:
    target = _cloud(2, 12)
    mirrored = target * np.array([1.0, 1.0, -1.0])
    assert np.linalg.det(kabsch(mirrored, target)[0]) == pytest.approx(1.0)
    assert aligned_rmsd(mirrored, target) > 1.0


def test_agrees_with_scipy_on_noisy_points() -> None:
    mobile, target = _cloud(3, 20), _cloud(3, 20) + _cloud(4, 20) / 5
    centred = mobile - mobile.mean(axis=0), target - target.mean(axis=0)
    _, distance = Rotation.align_vectors(centred[1], centred[0])
    assert aligned_rmsd(_moved(mobile, 5), target) == pytest.approx(distance / np.sqrt(20))


def test_batches_broadcast_and_weights_choose_sites() -> None:
    target = _cloud(6, 9)
    batch = np.stack([_moved(target, seed) for seed in range(4)])
    batch[:, 6:] += 30.0
    weights = (np.arange(9) < 6).astype(float)
    assert aligned_rmsd(batch, target, weights).shape == (4,)
    assert np.allclose(aligned_rmsd(batch, target, weights), 0.0, atol=1e-9)
    assert (rmsd(superpose(batch, target, weights), target) > 1.0).all()
    assert np.allclose(centroid(target, weights), target[:6].mean(axis=0))


def test_arguments_are_left_as_they_were() -> None:
    mobile, target = _cloud(7, 5), _cloud(8, 5)
    kept = mobile.copy(), target.copy()
    superpose(mobile, target)
    assert np.array_equal(mobile, kept[0]) and np.array_equal(target, kept[1])


def test_no_weighted_site_is_an_error() -> None:
    with pytest.raises(ValueError, match="weighted site"):
        superpose(_cloud(9, 4), _cloud(10, 4), np.zeros(4))
