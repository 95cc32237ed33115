"""Crystals measured and compared: densities, neighbours, validity, which known structures were found.

In: a System of kind CRYSTAL with Frames that carry a cell [F, 3, 3] Å. Out: numbers per structure, and numbers that
compare two sets of one composition. Structures are matched by pymatgen's StructureMatcher; atomic masses and covalent
radii are ASE's. Knows no models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dig_scale.errors import UserError
from dig_scale.geometry import lattice
from dig_scale.importers.crystal_duplicates import Entry, Shape, Similarity, alike, entry, first_of_each, matcher
from dig_scale.system import Frames, System
from dig_scale.units import AVOGADRO

BOND_FACTOR = 1.85 / 1.52
"""Of the sum of covalent radii: 1.85 Å between carbon atoms, past the first and before the second neighbours."""
PUBLISHED_SIMILARITY = Similarity(0.3, 0.5, 10.0, math.inf, math.inf)
"""What Zheng et al. 2023 count as a match of a sampled carbon structure with a known one: ltol 0.3, stol 0.5, 10 degrees."""
_CM3_PER_A3 = 1e-24
_STRUCTURES_AT_ONCE = 128
_DENSEST_SPACING = 1.13
"""Of the cube root of the volume per site: no arrangement is further apart than close packing, 2^(1/6) = 1.122."""


@dataclass(frozen=True)
class Plausible:
    """What a structure must have to count as one: shortest_distance in Å, volume per site within Å³ limits."""

    shortest_distance: float = 0.5
    smallest_volume: float = 1.0
    largest_volume: float = 1000.0


@dataclass(frozen=True)
class Matches:
    """For each sample the index of the known structure it is, or -1, and its root-mean-square displacement in units of the
    cube root of the volume per atom, NaN where there is none.
    """

    known: np.ndarray
    rms: np.ndarray

    @property
    def rate(self) -> float:
        """Fraction of samples that are a known structure."""
        return float((self.known >= 0).mean())

    @property
    def novelty(self) -> float:
        """Fraction of samples that are none."""
        return 1 - self.rate

    def coverage(self, n_known: int) -> float:
        """Fraction of `n_known` structures that some sample is."""
        return len(set(self.known[self.known >= 0].tolist())) / n_known


@dataclass(frozen=True)
class Comparison:
    """Samples against reference structures of one composition: Wasserstein-1 distances (density in g/cm³, shortest distance
    in Å, mean coordination number), fraction plausible, match rate with its mean displacement, coverage of the reference,
    and uniqueness among the samples.
    """

    density: float
    shortest_distance: float
    coordination: float
    plausible: float
    match_rate: float
    match_rms: float
    coverage: float
    uniqueness: float


def compare(
    system: System, samples: Frames, reference: Frames, similarity: Similarity = PUBLISHED_SIMILARITY
) -> Comparison:
    """Every number of a Comparison; matching costs milliseconds per pair."""
    matches = match_structures(system, samples, reference, similarity)
    found = matches.rms[matches.known >= 0]
    pairs = {
        "density": (densities(system, samples), densities(system, reference)),
        "shortest_distance": (shortest_distances(system, samples), shortest_distances(system, reference)),
        "coordination": (coordination(system, samples).mean(1), coordination(system, reference).mean(1)),
    }
    return Comparison(
        **{name: wasserstein(ours, theirs) for name, (ours, theirs) in pairs.items()},
        plausible=float(are_plausible(system, samples).mean()),
        match_rate=matches.rate,
        match_rms=float(found.mean()) if len(found) else math.nan,
        coverage=matches.coverage(reference.n_frames),
        uniqueness=uniqueness(system, samples, similarity),
    )


def densities(system: System, frames: Frames) -> np.ndarray:
    """Mass densities [F] in g/cm³."""
    from ase.data import atomic_masses

    grams = float(atomic_masses[system.elements].sum()) / AVOGADRO
    return grams / (_volumes(system, frames) * _CM3_PER_A3)


def shortest_distances(system: System, frames: Frames) -> np.ndarray:
    """Shortest distance [F] in Å between two sites, images included."""
    bounds = _DENSEST_SPACING * (_volumes(system, frames) / system.n_sites) ** (1 / 3)
    found = np.full(frames.n_frames, np.inf)
    for start, edges in _neighbours(system, frames, float(bounds.max())):
        np.minimum.at(found, start + edges.sample.numpy(), edges.distances.numpy())
    return found


def coordination(system: System, frames: Frames, factor: float = BOND_FACTOR) -> np.ndarray:
    """Neighbours [F, N] of every site closer than `factor` times the sum of covalent radii, images included."""
    from ase.data import covalent_radii

    radii = torch.from_numpy(covalent_radii[system.elements]) * factor
    counts = np.zeros((frames.n_frames, system.n_sites), np.int64)
    for start, edges in _neighbours(system, frames, 2 * float(radii.max())):
        bonded = edges.distances < radii[edges.i] + radii[edges.j]
        np.add.at(counts, (start + edges.sample[bonded].numpy(), edges.i[bonded].numpy()), 1)
    return counts


def are_plausible(system: System, frames: Frames, limits: Plausible | None = None) -> np.ndarray:
    """Whether each structure [F] is finite, of a plausible volume, and without sites on top of each other."""
    limits = limits or Plausible()
    cells = _cells(system, frames)
    finite = np.isfinite(frames.positions).all((1, 2)) & np.isfinite(cells).all((1, 2))
    volume = np.where(finite, np.abs(np.linalg.det(np.where(finite[:, None, None], cells, np.eye(3)))), 0)
    good = (volume / system.n_sites >= limits.smallest_volume) & (volume / system.n_sites <= limits.largest_volume)
    kept = np.flatnonzero(good)
    chosen = Frames(frames.positions[kept], frames.time_ps[kept], cell=cells[kept])
    for start, edges in _neighbours(system, chosen, limits.shortest_distance):
        good[kept[start + edges.sample.numpy()]] = False
    return good


def wasserstein(first: np.ndarray, second: np.ndarray) -> float:
    """Wasserstein-1 distance of two samples of a number, in its unit."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(first, second))


def match_structures(
    system: System, samples: Frames, known: Frames, similarity: Similarity = PUBLISHED_SIMILARITY
) -> Matches:
    """The known structure that each sample is: of those that the matcher accepts, the one nearest in volume."""
    ours, theirs = entries(system, samples), entries(system, known)
    judge = matcher(similarity)
    found, rms = np.full(len(ours), -1), np.full(len(ours), np.nan)
    for number, sample in enumerate(ours):
        for candidate in _by_volume(sample, theirs):
            if not alike(sample, theirs[candidate], similarity):
                continue
            displacement = judge.get_rms_dist(sample.structure, theirs[candidate].structure)
            if displacement is not None:
                found[number], rms[number] = candidate, displacement[0]
                break
    return Matches(found, rms)


def uniqueness(system: System, frames: Frames, similarity: Similarity = PUBLISHED_SIMILARITY) -> float:
    """Fraction of structures that are left when repeats are removed."""
    return len(set(first_of_each(_shapes(system, frames), similarity))) / frames.n_frames


def entries(system: System, frames: Frames) -> list[Entry]:
    """Structures as the matcher takes them."""
    return [entry(shape) for shape in _shapes(system, frames)]


def _by_volume(sample: Entry, known: Sequence[Entry]) -> list[int]:
    return sorted(range(len(known)), key=lambda k: abs(math.log(known[k].volume_per_atom / sample.volume_per_atom)))


def _shapes(system: System, frames: Frames) -> list[Shape]:
    cells = _cells(system, frames)
    energies = [None] * frames.n_frames if frames.energy is None else frames.energy.tolist()
    rows = zip(_places(system, frames), cells, energies, strict=True)
    return [Shape(system.elements, place, cell, energy) for place, cell, energy in rows]


def _neighbours(system: System, frames: Frames, cutoff: float) -> list[tuple[int, lattice.Edges]]:
    """(first frame, edges) of pieces of the frames."""
    cells = torch.from_numpy(_cells(system, frames))
    places = torch.from_numpy(_places(system, frames))
    pieces = []
    for start in range(0, frames.n_frames, _STRUCTURES_AT_ONCE):
        part = slice(start, start + _STRUCTURES_AT_ONCE)
        there = torch.ones(places[part].shape[:2], dtype=torch.bool)
        pieces.append((start, lattice.periodic_edges(places[part], cells[part], there, cutoff)))
    return pieces


def _places(system: System, frames: Frames) -> np.ndarray:
    cells = torch.from_numpy(_cells(system, frames))
    return lattice.fractional(torch.from_numpy(np.asarray(frames.positions, np.float64)), cells).numpy()


def _volumes(system: System, frames: Frames) -> np.ndarray:
    return np.abs(np.linalg.det(_cells(system, frames)))


def _cells(system: System, frames: Frames) -> np.ndarray:
    if frames.cell is None:
        raise UserError(f"structures of {system.name!r} have no cell; expected one per frame, [F, 3, 3] in Å")
    return np.asarray(frames.cell, np.float64)
