"""Histograms, Jensen-Shannon divergence and the block bootstrap. Pure numpy; knows numbers, not molecules.

A histogram is a vector of counts (a map is flattened). Divergences are in natural units (nat), plug-in estimates from
counts: a finite sample of the same distribution scores above zero by about (K - 1)/8 · (1/n + 1/m) for K occupied bins,
n and m independent frames (Grassberger 1988 to leading order), so a divergence is read against that of a same-size resample.

The bootstrap resamples blocks of consecutive frames (Künsch 1989): frames of a trajectory are correlated, and blocks keep
the correlation inside. Independent samples are the case of blocks that may be of any length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_BLOCKS = 1000
"""Blocks per set at most: more only costs memory, the error bar is already known to 2 %."""


def circular_bins(angles: np.ndarray, n_bins: int) -> np.ndarray:
    """Bin index of angles in radians, `n_bins` equal bins from -pi to pi, wrapped."""
    index = np.floor((np.asarray(angles, np.float64) + np.pi) * (n_bins / (2 * np.pi))).astype(np.int64)
    return index % n_bins


def map_bins(first: np.ndarray, second: np.ndarray, n_bins: int) -> np.ndarray:
    """Flat bin index [F] of a torsion pair on an n_bins x n_bins map, first torsion major."""
    return circular_bins(first, n_bins) * n_bins + circular_bins(second, n_bins)


def linear_bins(values: np.ndarray, low: float, high: float, n_bins: int) -> np.ndarray:
    """Bin index of values, `n_bins` equal bins from low to high; what lies outside goes to the end bins."""
    index = np.floor((np.asarray(values, np.float64) - low) * (n_bins / (high - low)))
    return np.clip(index, 0, n_bins - 1).astype(np.int64)


def counts(bins: np.ndarray, n_bins: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Histogram [n_bins] of bin indices, weighted when weights [F] are given."""
    return np.bincount(bins, weights=weights, minlength=n_bins).astype(np.float64)


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in nat between histograms along the last axis: 0 if equal, ln 2 if disjoint.

    Arrays broadcast; each histogram is normalised by its own sum. Raises ValueError for an empty histogram.
    """
    p, q = _normalised(first), _normalised(second)
    mixture = (p + q) / 2
    return (_relative_entropy(p, mixture).sum(axis=-1) + _relative_entropy(q, mixture).sum(axis=-1)) / 2


def free_energy(histogram: np.ndarray) -> np.ndarray:
    """Free energy -ln p in kT per bin of a histogram; NaN where no frame fell."""
    p = _normalised(histogram)
    return -np.log(np.where(p > 0, p, np.nan))


@dataclass(frozen=True)
class Resampling:
    """A block bootstrap of one set: block of every frame [F], and how often each replicate draws each block [B, n_blocks]."""

    block_of_frame: np.ndarray
    draws: np.ndarray
    block_length: int

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return self.draws.shape[1]

    def counts(self, bins: np.ndarray, n_bins: int, weights: np.ndarray | None = None) -> np.ndarray:
        """Replicate histograms [B, n_bins] of bin indices [F]."""
        flat = self.block_of_frame * n_bins + bins
        of_block = counts(flat, self.n_blocks * n_bins, weights).reshape(self.n_blocks, n_bins)
        return self.draws @ of_block

    def means(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Replicate weighted means [B] of values [F] with weights [F]."""
        sums = np.bincount(self.block_of_frame, weights=values * weights, minlength=self.n_blocks)
        sizes = np.bincount(self.block_of_frame, weights=weights, minlength=self.n_blocks)
        return (self.draws @ sums) / (self.draws @ sizes)


def block_resampling(
    trajectory: np.ndarray, block_length: int, n_replicates: int, generator: np.random.Generator
) -> Resampling:
    """Bootstrap over blocks of `block_length` consecutive frames; no block spans two trajectories.

    trajectory [F] is each frame's trajectory, frames of one trajectory adjacent and in time order.
    """
    starts = np.flatnonzero(np.r_[True, trajectory[1:] != trajectory[:-1]])
    lengths = np.diff(np.r_[starts, len(trajectory)])
    blocks, first_block = [], 0
    for length in lengths.tolist():
        n_blocks = max(1, round(length / block_length))
        blocks.append(first_block + np.arange(length) * n_blocks // length)
        first_block += n_blocks
    draws = generator.multinomial(first_block, np.full(first_block, 1 / first_block), size=n_replicates)
    return Resampling(np.concatenate(blocks), draws.astype(np.float64), block_length)


def independent_resampling(n_samples: int, n_replicates: int, generator: np.random.Generator) -> Resampling:
    """Bootstrap of independent samples; they are resampled in MAX_BLOCKS groups at most, which leaves errors unchanged."""
    block_length = -(-n_samples // MAX_BLOCKS)
    return block_resampling(np.zeros(n_samples, np.int64), block_length, n_replicates, generator)


def resampled_divergence(histogram: np.ndarray, n_draws: int, repeats: int, generator: np.random.Generator) -> float:
    """Mean divergence in nat between a histogram and `n_draws` frames drawn from it with replacement: the noise floor."""
    draws = generator.multinomial(n_draws, _normalised(histogram), size=repeats)
    return float(jensen_shannon(draws, histogram).mean())


def band(replicates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The central 95 % of replicates [B, K]: lower and upper edge [K]."""
    lower, upper = np.percentile(replicates, [2.5, 97.5], axis=0)
    return lower, upper


def _normalised(histogram: np.ndarray) -> np.ndarray:
    histogram = np.asarray(histogram, np.float64)
    total = histogram.sum(axis=-1, keepdims=True)
    if not (total > 0).all():
        raise ValueError("a histogram without counts has no distribution; expected at least one frame")
    return histogram / total


def _relative_entropy(p: np.ndarray, mixture: np.ndarray) -> np.ndarray:
    """Terms p ln(p / m), zero where p is; m > 0 wherever p is."""
    ratio = np.divide(p, mixture, out=np.ones_like(mixture), where=(p > 0) & (mixture > 0))
    return p * np.log(ratio)
