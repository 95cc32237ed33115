"""A judge of heats of formation that has nothing in common with the generator: kernel ridge on pair statistics of elements.

A structure becomes means and spreads of element properties, and sums over neighbours within REACH of radial Gaussians times
products of these properties. Trained on four fifths of the labelled structures; its error is that on the last fifth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from dig_scale.geometry.lattice import fractional, periodic_edges
from dig_scale.importers.crystal import CrystalOptions, load_crystals
from dig_scale.system import Frames, System

LABEL = "heat_ref"
REACH = 6.0
SHELLS = np.linspace(1.0, 5.5, 10)
WIDTH = 0.5
RIDGE = 1e-3


@dataclass(frozen=True)
class Judge:
    """Predicts eV/atom; mean and spread of the labels, and mean absolute error on structures it has not seen."""

    mean: float
    spread: float
    error: float
    centre: np.ndarray
    scale: np.ndarray
    known: np.ndarray
    weights: np.ndarray

    def __call__(self, system: System, frames: Frames) -> np.ndarray:
        """Heats of formation [F] in eV/atom."""
        features = (described(system, frames) - self.centre) / self.scale
        return self.mean + _kernel(features, self.known) @ self.weights


@lru_cache(maxsize=1)
def fit_judge(path: Path) -> Judge:
    """The judge of a CSV with CIFs and heats of formation."""
    groups, _ = load_crystals([path], CrystalOptions(similarity=None))
    features = np.concatenate([described(system, frames) for system, frames in groups])
    labels = np.concatenate([frames.labels[LABEL] for _, frames in groups])
    centre, scale = features.mean(0), features.std(0) + 1e-9
    rows = (features - centre) / scale
    order = np.random.default_rng(0).permutation(len(rows))
    train, test = order[len(rows) // 5 :], order[: len(rows) // 5]
    mean = float(labels[train].mean())
    known = rows[train]
    kernel = _kernel(known, known) + RIDGE * np.eye(len(known))
    weights = np.linalg.solve(kernel, labels[train] - mean)
    error = float(np.abs(mean + _kernel(rows[test], known) @ weights - labels[test]).mean())
    return Judge(mean, float(labels.std()), error, centre, scale, known, weights)


def described(system: System, frames: Frames) -> np.ndarray:
    """Features [F, C] of structures."""
    properties = np.array([_properties(int(z)) for z in system.elements])
    products = np.stack([properties[:, a] for a in range(properties.shape[1])], axis=1)
    assert frames.cell is not None
    cell = torch.as_tensor(frames.cell, dtype=torch.float64)
    places = fractional(torch.as_tensor(frames.positions, dtype=torch.float64), cell)
    edges = periodic_edges(places, cell, torch.ones(places.shape[:2], dtype=torch.bool), REACH)
    radial = np.exp(-0.5 * ((edges.distances.numpy()[:, None] - SHELLS) / WIDTH) ** 2)
    pair = products[edges.i.numpy()] * products[edges.j.numpy()]
    apart = np.abs(products[edges.i.numpy()] - products[edges.j.numpy()])
    sums = np.zeros((frames.n_frames, len(SHELLS) * 2 * products.shape[1]))
    np.add.at(
        sums,
        edges.sample.numpy(),
        (radial[:, :, None] * np.concatenate([pair, apart], 1)[:, None]).reshape(len(radial), -1),
    )
    volume = np.abs(np.linalg.det(frames.cell))[:, None] / system.n_sites
    overall = np.concatenate([properties.mean(0), properties.std(0)])
    return np.concatenate([sums / system.n_sites, volume, np.tile(overall, (frames.n_frames, 1))], axis=1)


def _kernel(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    squared = (one**2).sum(1)[:, None] + (two**2).sum(1)[None] - 2 * one @ two.T
    return np.exp(-np.maximum(squared, 0) / (2 * one.shape[1]))


@lru_cache(maxsize=128)
def _properties(number: int) -> tuple[float, ...]:
    from pymatgen.core import Element

    element = Element.from_Z(number)
    radius = float(element.atomic_radius or 1.5)
    electronegativity = float(element.X) if element.X == element.X else 1.5
    return 1.0, electronegativity, radius, element.group / 18, element.row / 7, element.mendeleev_no / 103
