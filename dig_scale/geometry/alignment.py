"""Rigid superposition: centring, Kabsch rotations, RMSD. Pure numpy, batched, masked; nothing is changed in place.

In: positions [..., N, 3] Å that broadcast against each other, and weights [..., N] (a mask is weights of 0 and 1). Out:
new arrays. The rotation is proper: a mirror image is never turned into its original (Kabsch 1978, with the sign of Umeyama
1991). Knows no molecules.
"""

from __future__ import annotations

import numpy as np


def centroid(positions: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Weighted mean [..., 3] in Å of positions [..., N, 3]; raises ValueError where all weights are zero."""
    shares = _shares(positions, weights)
    return np.einsum("...n,...ni->...i", shares, positions)


def kabsch(mobile: np.ndarray, target: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rotation R [..., 3, 3] and translation [..., 3] Å such that mobile @ R^T + translation lies best on target."""
    shares = _shares(mobile, weights)
    from_centre, to_centre = centroid(mobile, weights), centroid(target, weights)
    a, b = mobile - from_centre[..., None, :], target - to_centre[..., None, :]
    covariance = np.einsum("...n,...ni,...nj->...ij", shares, b, a)
    u, _, vh = np.linalg.svd(covariance)
    sign = np.ones(covariance.shape[:-1])
    sign[..., 2] = np.where(np.linalg.det(u @ vh) < 0, -1.0, 1.0)
    rotation = (u * sign[..., None, :]) @ vh
    return rotation, to_centre - np.einsum("...ij,...j->...i", rotation, from_centre)


def superpose(mobile: np.ndarray, target: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """All of `mobile` [..., N, 3] Å moved so that its weighted sites lie best on `target` [..., N, 3] Å."""
    rotation, translation = kabsch(mobile, target, weights)
    return mobile @ np.swapaxes(rotation, -1, -2) + translation[..., None, :]


def rmsd(first: np.ndarray, second: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Root mean square distance [...] in Å of sites as they stand, without superposition."""
    squared = ((first - second) ** 2).sum(axis=-1)
    return np.sqrt((_shares(first, weights) * squared).sum(axis=-1))


def aligned_rmsd(mobile: np.ndarray, target: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Smallest root mean square distance [...] in Å over all proper rigid motions of `mobile`."""
    return rmsd(superpose(mobile, target, weights), target, weights)


def _shares(positions: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Weights [..., N] that sum to one."""
    if weights is None:
        return np.full(positions.shape[-2], 1.0 / positions.shape[-2])
    given = np.asarray(weights, np.float64)
    total = given.sum(axis=-1, keepdims=True)
    if not (total > 0).all():
        raise ValueError("superposition without a single weighted site; expected at least one")
    return given / total
