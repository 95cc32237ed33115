"""Populations, free-energy differences, transitions, correlation times, effective sample sizes. Pure numpy.

Basins are boxes on the Ramachandran map. Free energies are in kT. The statistical inefficiency g = 1 + 2 Σ (1 - t/F) C(t)
(Chodera et al. 2007, eq. 10-12) is the number of frames that one independent frame costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CORE_MARGIN = 15.0
"""Degrees that a frame must lie inside a basin to count as having arrived there (transitions are core to core)."""
TINY_COUNT = 0.5
"""Added to counts of bootstrap replicates only, so that a replicate without visits has a finite free energy."""


@dataclass(frozen=True)
class Basin:
    """A box on the (φ, ψ) map in degrees, low ≤ angle < high, wrapped at 360°."""

    name: str
    phi: tuple[float, float]
    psi: tuple[float, float]
    definition: str


BASINS = (
    Basin("αR", (-180, 0), (-120, 50), "φ < 0 and −120° ≤ ψ < 50°"),
    Basin("β / PII", (-180, 0), (50, 240), "φ < 0 and ψ elsewhere (C5 and C7eq)"),
    Basin("φ > 0", (0, 180), (-180, 180), "φ ≥ 0 (αL and C7ax)"),
)


def assign_basins(phi: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """Index into BASINS [F] of angles in radians; the basins tile the map, so every frame has one."""
    return _assign(phi, psi, 0.0)


def core_sequence(phi: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """Last basin core visited [F] in one trajectory (milestones); -1 before the first."""
    inside = _assign(phi, psi, CORE_MARGIN)
    last = np.maximum.accumulate(np.where(inside >= 0, np.arange(len(inside)), -1))
    return np.where(last >= 0, inside[last], -1)


def count_arrivals(phi: np.ndarray, psi: np.ndarray, trajectory: np.ndarray) -> np.ndarray:
    """Arrivals in each basin's core from another's [len(BASINS)], summed over trajectories; frames in time order."""
    arrivals = np.zeros(len(BASINS), np.int64)
    for label in np.unique(trajectory):
        cores = core_sequence(phi[trajectory == label], psi[trajectory == label])
        cores = cores[cores >= 0]
        arrivals += np.bincount(cores[1:][cores[1:] != cores[:-1]], minlength=len(BASINS))
    return arrivals


def free_energy_differences(populations: np.ndarray, base: int) -> np.ndarray:
    """ΔF = -ln(p / p_base) in kT along the last axis; infinite where a basin is empty."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.log(populations / populations[..., base : base + 1])


def free_energy_errors(replicate_counts: np.ndarray, base: int) -> np.ndarray:
    """Standard errors [K] in kT of free_energy_differences from bootstrap counts [B, K]."""
    return free_energy_differences(replicate_counts + TINY_COUNT, base).std(axis=0, ddof=1)


def statistical_inefficiency(series: Sequence[np.ndarray]) -> float:
    """Frames per independent frame, at least 1, of one observable over trajectories [F_i] that share a mean.

    Correlations are pooled over the trajectories; the sum ends at their first zero. A constant observable gives 1.
    """
    mean = np.concatenate(series).mean()
    longest, total = max(len(x) for x in series), sum(len(x) for x in series)
    covariance, pairs = np.zeros(longest), np.zeros(longest)
    for x in series:
        covariance[: len(x)] += _autocovariance_sums(x - mean)
        pairs[: len(x)] += np.arange(len(x), 0, -1)
    if covariance[0] <= 1e-12 * total:
        return 1.0
    correlation = (covariance / pairs) / (covariance[0] / total)
    crossing = np.flatnonzero(correlation <= 0)
    end = int(crossing[0]) if len(crossing) else longest
    return float(max(1.0, 1 + 2 * (correlation[1:end] * pairs[1:end] / pairs[0]).sum()))


def slowest_inefficiency(torsions: np.ndarray, trajectory: np.ndarray) -> float:
    """Largest statistical inefficiency of cos and sin over torsions [F, T] in radians; 1 where there are none."""
    labels = [trajectory == label for label in np.unique(trajectory)]
    observables = [function(torsions[:, t]) for t in range(torsions.shape[1]) for function in (np.cos, np.sin)]
    return max((statistical_inefficiency([x[label] for label in labels]) for x in observables), default=1.0)


def kish_ess(log_weights: np.ndarray) -> float:
    """Effective sample size (Σw)² / Σw² (Kish 1965) of log weights [S] in nat."""
    weights = normalised_weights(log_weights)
    return float(1 / (weights**2).sum())


def normalised_weights(log_weights: np.ndarray) -> np.ndarray:
    """Weights [S] that sum to 1."""
    weights = np.exp(np.asarray(log_weights, np.float64) - np.max(log_weights))
    return weights / weights.sum()


def _autocovariance_sums(x: np.ndarray) -> np.ndarray:
    """Σ_t x(t) x(t + lag) for every lag [F], by FFT with zero padding."""
    spectrum = np.fft.rfft(x, n=2 * len(x))
    return np.fft.irfft(np.abs(spectrum) ** 2, n=2 * len(x))[: len(x)]


def _assign(phi: np.ndarray, psi: np.ndarray, margin: float) -> np.ndarray:
    phi_degrees, psi_degrees = np.degrees(phi.astype(np.float64)), np.degrees(psi.astype(np.float64))
    assigned = np.full(len(phi), -1)
    for index, basin in enumerate(BASINS):
        inside = _inside(phi_degrees, basin.phi, margin) & _inside(psi_degrees, basin.psi, margin)
        assigned[inside] = index
    return assigned


def _inside(degrees: np.ndarray, edges: tuple[float, float], margin: float) -> np.ndarray:
    width = edges[1] - edges[0]
    if width >= 360:
        return np.ones(len(degrees), bool)
    offset = np.mod(degrees - edges[0], 360.0)
    offset = np.where(offset >= 360.0, 0.0, offset)  # np.mod rounds a tiny negative up to the divisor
    return (offset >= margin) & (offset < width - margin)
