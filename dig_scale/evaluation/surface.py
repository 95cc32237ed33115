"""Where adsorbates are on a surface: sites, lateral free-energy maps, heights, and density maps over a grid.

In: a CATALYST System and positions [F, N, 3] Å. Out: labels, histograms and maps, in the primitive cell of the slab's top
layer, whose atoms are counted from wherever the layer has drifted as a whole. An adsorbate is where its lowest atom of the
reference is. Divergences are those of evaluation.distribution, in nat. Knows no sampler, no calculator: densities and
energies are functions that the caller gives. Density maps: Zheng et al. 2024, section on catalysts.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dig_scale.errors import UserError
from dig_scale.evaluation.distribution import counts, free_energy, jensen_shannon, linear_bins
from dig_scale.importers.slab import layers, surface_normal
from dig_scale.system import SiteRole, System
from dig_scale.units import thermal_energy

_ANGLE_TOLERANCE = 3.0
_LENGTH_TOLERANCE = 0.03
_THIRDS = np.array([[1.0, 1.0], [2.0, 2.0]]) / 3


class Symmetry(enum.StrEnum):
    """Whether a lateral map is averaged over the operations of its surface's plane group."""

    NONE = "none"
    SURFACE = "surface"
    """p3m1 for fcc(111) and hcp(0001), p4mm for fcc(100), p2mm for fcc(110)."""


@dataclass(frozen=True)
class SurfaceLattice:
    """The primitive cell of a top layer: origin [3] Å on an atom, vectors [2, 3] Å, unit normal [3], top layer's sites.

    names and places [K, 2], fractional, of ideal sites; operations [O, 2, 2] of the plane group on fractional coordinates.
    """

    origin: np.ndarray
    vectors: np.ndarray
    normal: np.ndarray
    top: np.ndarray
    names: tuple[str, ...]
    places: np.ndarray
    operations: np.ndarray
    group: str

    def fractional(self, points: np.ndarray) -> np.ndarray:
        """Fractional coordinates [..., 2] in [0, 1) of points [..., 3] Å."""
        flat = (points - self.origin) @ np.linalg.pinv(self.vectors)
        return np.asarray(flat - np.floor(flat))

    def heights(self, points: np.ndarray) -> np.ndarray:
        """Heights [...] Å of points [..., 3] over the reference's top layer."""
        return np.asarray((points - self.origin) @ self.normal)


def surface_lattice(system: System) -> SurfaceLattice:
    """The lattice of a slab's top layer; raises UserError for a top layer that is no flat (111), (100) or (110) lattice."""
    if system.cell is None:
        raise UserError(f"system {system.name!r}: has no cell; a surface needs one")
    slab = np.flatnonzero(system.roles != SiteRole.ADSORBATE)
    normal = surface_normal(system.cell)
    layer = layers(system.reference_positions[slab] @ normal)
    top, below = slab[layer == layer.max()], slab[layer == layer.max() - 1]
    vectors = _primitive_vectors(system, top, normal)
    start = system.reference_positions[top]
    residual = (start - start[0]) @ np.linalg.pinv(vectors)
    origin = start[0] + (residual - np.round(residual)).mean(axis=0) @ vectors
    height = float((start @ normal).mean() - origin @ normal)
    origin = origin + height * normal
    under = (system.reference_positions[below] - origin) @ np.linalg.pinv(vectors)
    names, places, operations, group = _ideal_sites(system, vectors, under)
    return SurfaceLattice(origin, vectors, normal, top, names, places, operations, group)


def adsorbate_anchors(system: System) -> np.ndarray:
    """Sites [A] that stand for the adsorbates: of each, the lowest in the reference; raises UserError if there is none."""
    guests = np.flatnonzero(system.roles == SiteRole.ADSORBATE)
    if not len(guests) or system.cell is None:
        raise UserError(f"system {system.name!r}: has no adsorbate; its sites cannot be looked at")
    height = system.reference_positions @ surface_normal(system.cell)
    parts = [guests[system.residue_index[guests] == part] for part in np.unique(system.residue_index[guests])]
    return np.array([part[np.argmin(height[part])] for part in parts])


def adsorbate_points(system: System, lattice: SurfaceLattice, positions: np.ndarray) -> np.ndarray:
    """Points [F, A, 3] Å of adsorbates, less the drift of the top layer as a whole, which heights count from too."""
    drift = (positions[:, lattice.top] - system.reference_positions[lattice.top]).mean(axis=1)
    return np.asarray(positions[:, adsorbate_anchors(system)] - drift[:, None])


def classified(lattice: SurfaceLattice, points: np.ndarray) -> np.ndarray:
    """Index [...] into lattice.names of the ideal site nearest to points [..., 3] along the surface (a Voronoi cell)."""
    apart = lattice.fractional(points)[..., None, :] - lattice.places
    steps = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(-1, 2)
    distances = np.linalg.norm((apart[..., None, :] + steps) @ lattice.vectors, axis=-1).min(axis=-1)
    return np.asarray(distances.argmin(axis=-1))


def site_labels(system: System, positions: np.ndarray) -> np.ndarray:
    """Names [F, A] of the sites where the adsorbates are."""
    lattice = surface_lattice(system)
    index = classified(lattice, adsorbate_points(system, lattice, positions))
    return np.array(lattice.names)[index]


def populations(system: System, positions: np.ndarray) -> dict[str, float]:
    """Share of the adsorbates of all frames at every kind of site; they sum to 1."""
    labels = site_labels(system, positions)
    names = dict.fromkeys(surface_lattice(system).names)
    return {name: float((labels == name).mean()) for name in names}


def lateral_histogram(
    system: System, positions: np.ndarray, n_bins: int, symmetry: Symmetry = Symmetry.NONE
) -> np.ndarray:
    """Counts [n_bins, n_bins] of adsorbates in the primitive cell, along its first and second vector from a top atom.

    With Symmetry.SURFACE every adsorbate counts 1 in all, in equal shares at its images under the plane group.
    """
    lattice = surface_lattice(system)
    where = lattice.fractional(adsorbate_points(system, lattice, positions)).reshape(-1, 2)
    operations = lattice.operations if symmetry is Symmetry.SURFACE else np.eye(2)[None]
    histogram = np.zeros(n_bins * n_bins)
    for operation in operations:
        image = where @ operation.T
        bins = np.floor((image - np.floor(image)) * n_bins).astype(np.int64) % n_bins
        histogram += counts(bins[:, 0] * n_bins + bins[:, 1], n_bins * n_bins) / len(operations)
    return histogram.reshape(n_bins, n_bins)


def lateral_free_energy(histogram: np.ndarray, temperature: float) -> np.ndarray:
    """-kT ln p in eV per bin of a lateral histogram, its minimum at 0; NaN where no adsorbate was."""
    profile = free_energy(histogram.ravel()).reshape(histogram.shape) * thermal_energy(temperature)
    return np.asarray(profile - np.nanmin(profile))


def lateral_divergence(first: np.ndarray, second: np.ndarray) -> float:
    """Jensen-Shannon divergence in nat of two lateral histograms of the same bins: 0 if equal, ln 2 if disjoint."""
    if first.shape != second.shape:
        raise UserError(f"lateral maps of {first.shape} and {second.shape} bins; make both with the same bins")
    return float(jensen_shannon(first.ravel(), second.ravel()))


def adsorbate_heights(system: System, positions: np.ndarray) -> np.ndarray:
    """Heights [F, A] Å of adsorbates over the mean of the top layer's atoms in the same frame."""
    lattice = surface_lattice(system)
    return lattice.heights(adsorbate_points(system, lattice, positions))


@dataclass(frozen=True)
class HeightComparison:
    """Mean heights in Å of a set and of its reference, and the divergence in nat of their histograms."""

    mean: float
    reference_mean: float
    divergence: float


def compared_heights(heights: np.ndarray, reference: np.ndarray, n_bins: int) -> HeightComparison:
    """Compare heights [F, A] with reference heights [G, A], in `n_bins` equal bins over the range of the reference.

    What lies outside that range counts in its end bins.
    """
    low, high = float(reference.min()), float(reference.max())
    if not high > low:
        raise UserError(f"all reference heights are {low:.4g} Å; a distribution needs more than one")
    histograms = [counts(linear_bins(values.ravel(), low, high, n_bins), n_bins) for values in (heights, reference)]
    return HeightComparison(float(heights.mean()), float(reference.mean()), float(jensen_shannon(*histograms)))


# --- maps over a grid -----------------------------------------------------------------------------------------------

OfPositions = Callable[[np.ndarray], np.ndarray]
"""Positions [M, N, 3] Å -> one number each [M]: a log-density, or an energy in eV."""


def probe_positions(system: System, n_grid: int, heights: Sequence[float]) -> np.ndarray:
    """Positions [n_grid, n_grid, H, N, 3] Å: the reference with its one adsorbate moved over a grid of the slab's cell.

    Its lowest atom goes to fractions i / n_grid, j / n_grid of the first and second cell vector, at `heights` Å over the
    top layer. Raises UserError unless there is just one adsorbate.
    """
    anchors, lattice = adsorbate_anchors(system), surface_lattice(system)
    if len(anchors) != 1 or system.cell is None:
        raise UserError(f"system {system.name!r}: {len(anchors)} adsorbates; a map over a grid moves just one")
    fractions = np.stack(np.meshgrid(*[np.arange(n_grid) / n_grid] * 2, indexing="ij"), axis=-1)
    flat = fractions @ system.cell[:2]
    flat = flat + (lattice.origin @ lattice.normal - flat @ lattice.normal)[..., None] * lattice.normal
    goals = flat[:, :, None] + np.asarray(heights, float)[:, None] * lattice.normal
    moves = goals - system.reference_positions[anchors[0]]
    guest = (system.roles == SiteRole.ADSORBATE).astype(float)
    return np.asarray(system.reference_positions + moves[..., None, :] * guest[:, None])


def density_map(log_p: OfPositions, system: System, n_grid: int, heights: Sequence[float]) -> np.ndarray:
    """log p [n_grid, n_grid] of the adsorbate over the cell: at every point the largest of `log_p` over the heights."""
    return _mapped(log_p, system, n_grid, heights).max(axis=-1)


def energy_map(energy: OfPositions, system: System, n_grid: int, heights: Sequence[float]) -> np.ndarray:
    """Energy [n_grid, n_grid] of the adsorbate over the cell: at every point the smallest of `energy` over the heights."""
    return _mapped(energy, system, n_grid, heights).min(axis=-1)


def _mapped(function: OfPositions, system: System, n_grid: int, heights: Sequence[float]) -> np.ndarray:
    probes = probe_positions(system, n_grid, heights)
    values = np.asarray(function(probes.reshape(-1, *probes.shape[-2:])), float)
    if values.shape != (n_grid * n_grid * len(heights),):
        raise UserError(f"a map's function gave shape {values.shape} for {n_grid * n_grid * len(heights)} structures")
    return values.reshape(n_grid, n_grid, len(heights))


@dataclass(frozen=True)
class MapAgreement:
    """Pearson's and Spearman's correlation of log p with -E over the points of a map; 1 is perfect agreement."""

    pearson: float
    spearman: float


def map_agreement(log_p: np.ndarray, energy: np.ndarray) -> MapAgreement:
    """Correlation of a density map with an energy map of the same grid; raises UserError for maps that do not match."""
    from scipy.stats import spearmanr

    if log_p.shape != energy.shape or not (np.isfinite(log_p).all() and np.isfinite(energy).all()):
        raise UserError(f"maps of {log_p.shape} and {energy.shape} points; expected two finite maps of one grid")
    pearson = np.corrcoef(log_p.ravel(), -energy.ravel())[0, 1]
    return MapAgreement(float(pearson), float(spearmanr(log_p.ravel(), -energy.ravel()).statistic))


# --- the top layer's lattice ----------------------------------------------------------------------------------------


def _primitive_vectors(system: System, top: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Reduced primitive vectors [2, 3] Å at 60 to 90 degrees; relaxed atoms are idealised by way of the slab's cell."""
    cell = np.asarray(system.cell)[:2]
    steps = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(-1, 2)
    atoms = system.reference_positions[top]
    apart = ((atoms - atoms[0])[:, None] + steps @ cell).reshape(-1, 3)
    apart = apart - (apart @ normal)[:, None] * normal
    length = np.linalg.norm(apart, axis=1)
    apart = apart[np.argsort(length, kind="stable")][1:]
    first = apart[0]
    across = np.linalg.norm(np.cross(apart, first), axis=1) / np.linalg.norm(apart, axis=1) / np.linalg.norm(first)
    rough = np.stack([first, apart[np.argmax(across > 0.5)]])
    whole = np.round(cell @ np.linalg.pinv(rough))
    if abs(round(np.linalg.det(whole))) != len(top):
        raise UserError(
            f"system {system.name!r}: its top layer of {len(top)} atoms is no single lattice (steps and added rows are not "
            f"classified)"
        )
    a, b = np.linalg.inv(whole) @ cell
    return np.stack([a, b if a @ b >= 0 else -b])


def _ideal_sites(
    system: System, vectors: np.ndarray, under: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, str]:
    """Names, places, operations and plane group; `under` [M, 2] are fractional places of the second layer's atoms."""
    length = np.linalg.norm(vectors, axis=1)
    angle = float(np.degrees(np.arccos(vectors[0] @ vectors[1] / length.prod())))
    equal = abs(length[0] / length[1] - 1) < _LENGTH_TOLERANCE
    if equal and abs(angle - 60) < _ANGLE_TOLERANCE:
        hcp = _hollow_over(under) if len(under) else 0
        hollows = ("hcp", "fcc") if hcp == 0 else ("fcc", "hcp")
        places = np.array([[0, 0], [0.5, 0], [0, 0.5], [0.5, 0.5], *_THIRDS])
        turn, mirror = np.array([[-1, -1], [1, 0]]), np.array([[0, 1], [1, 0]])
        return ("ontop", "bridge", "bridge", "bridge", *hollows), places, _group(turn, mirror), "p3m1"
    if abs(angle - 90) < _ANGLE_TOLERANCE:
        long = ("bridge", "bridge") if equal else ("longbridge", "shortbridge")
        bridges = long if length[0] > length[1] else long[::-1]
        places = np.array([[0, 0], [0.5, 0], [0, 0.5], [0.5, 0.5]])
        turn = np.array([[0, -1], [1, 0]]) if equal else np.array([[-1, 0], [0, -1]])
        return (
            ("ontop", *bridges, "hollow"),
            places,
            _group(turn, np.array([[1, 0], [0, -1]])),
            ("p4mm" if equal else "p2mm"),
        )
    raise UserError(
        f"system {system.name!r}: its top layer has vectors of {length[0]:.2f} and {length[1]:.2f} Å at {angle:.0f} degrees; "
        f"sites are known for (111), (100), (110) of fcc and (0001) of hcp"
    )


def _hollow_over(under: np.ndarray) -> int:
    """Which of the two hollows most atoms of the second layer lie under."""
    apart = under[:, None] - _THIRDS
    away = np.abs(apart - np.round(apart)).sum(axis=-1)
    return int(np.bincount(away.argmin(axis=1), minlength=2).argmax())


def _group(*generators: np.ndarray) -> np.ndarray:
    """All operations [O, 2, 2] that the generators make, the identity first."""
    found = [np.eye(2, dtype=int)]
    for known in found:
        for generator in generators:
            new = generator @ known
            if not any((new == one).all() for one in found):
                found.append(new)
    return np.array(found)
