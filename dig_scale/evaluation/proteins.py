"""Ensembles of proteins with residue frames: likeness to known structures, physical soundness, distances against MD.

In: C-alpha positions [S, N, 3] Å, rotations [S, N, 3, 3] of backbone frames, and the System that names residues and bonds.
Out: numbers per sample or per pair of residues. RMSD is after superposition; TM-score as Zhang and Skolnick 2004, residues
matched by index, normalised by the reference; soundness as BioEmu filters its samples (Lewis et al. 2024), on the backbone
that the frames imply. Knows no model and no side chains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree

from dig_scale.errors import UserError
from dig_scale.evaluation.distribution import jensen_shannon
from dig_scale.evaluation.reference import first_halves
from dig_scale.evaluation.structure import bond_lengths
from dig_scale.geometry.alignment import aligned_rmsd, kabsch
from dig_scale.geometry.rotations import BACKBONE_ATOMS, backbone_from_frames
from dig_scale.system import System

CA_STEP = 3.8
"""Å between C-alphas of residues joined by a trans peptide bond."""
CA_STEP_TOLERANCE = 0.2
CA_CLASH_DISTANCE = 3.0
"""Å; C-alphas of residues that are not joined clash below it."""
CONTACT_DISTANCE = 8.0
_TM_ITERATIONS = 20
_TM_SHORTEST_SEED = 4
_TM_REFINED_SEEDS = 12
_FAR_IN_SEQUENCE = 3
_CHUNK_TERMS = 4_000_000


@dataclass(frozen=True)
class PhysicalLimits:
    """What a sound sample keeps to, in Å: longest CA-CA and C-N between joined residues, closest atoms of residues that are
    at least three apart in sequence or in different chains, as BioEmu filters; and the shortest CA-CA, since a chain that
    has collapsed onto itself passes those (the shortest natural step, of a cis peptide bond, is 2.9 Å).
    """

    ca_step: float = 4.5
    peptide_bond: float = 2.0
    closest: float = 1.0
    shortest_ca_step: float = 2.6


@dataclass(frozen=True)
class Soundness:
    """Samples [S]: share of joined residues 3.8 ± 0.2 Å apart, shortest and longest CA-CA, longest C-N of joined residues (Å),
    pairs of C-alphas closer than 3 Å though not joined, pairs of backbone atoms below the limit, and whether all limits are kept.
    """

    ca_steps_near: np.ndarray
    shortest_ca_step: np.ndarray
    longest_ca_step: np.ndarray
    longest_peptide_bond: np.ndarray
    ca_clashes: np.ndarray
    atom_clashes: np.ndarray
    sound: np.ndarray


@dataclass(frozen=True)
class StateVisit:
    """Samples against one named state: CA-RMSD [S] in Å and TM-score [S], and the fraction of samples within the radius."""

    rmsd: np.ndarray
    tm_score: np.ndarray
    fraction: float


@dataclass(frozen=True)
class DistanceDivergence:
    """Pairs [P, 2] of residues: Jensen-Shannon divergence [P] in nat of their distance, samples against MD, and the floor [P]:
    that of the first half of the MD against its second.
    """

    pairs: np.ndarray
    divergence: np.ndarray
    floor: np.ndarray

    @property
    def mean(self) -> float:
        """Mean divergence over pairs, in nat."""
        return float(self.divergence.mean())

    @property
    def mean_floor(self) -> float:
        """Mean floor over pairs, in nat."""
        return float(self.floor.mean())


def ca_rmsd(positions: np.ndarray, reference: np.ndarray, sites: np.ndarray | None = None) -> np.ndarray:
    """RMSD [S] in Å of samples [S, N, 3] from a structure [N, 3] after superposition, over `sites` [M] (None: all)."""
    chosen = np.arange(len(reference)) if sites is None else sites
    _require_same_residues(positions, reference)
    return aligned_rmsd(positions[:, chosen].astype(np.float64), reference[chosen].astype(np.float64))


def tm_score(positions: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """TM-score [S] in (0, 1] of samples [S, N, 3] Å against a structure [N, 3] Å of the same residues."""
    _require_same_residues(positions, reference)
    seeds = _tm_seeds(len(reference))
    target = reference.astype(np.float64)
    return np.array([_best_tm_score(sample.astype(np.float64), target, seeds) for sample in positions])


def state_visits(positions: np.ndarray, states: Mapping[str, np.ndarray], within: float) -> dict[str, StateVisit]:
    """How samples [S, N, 3] Å relate to named structures [N, 3] Å; `within` is the CA-RMSD in Å that counts as a visit."""
    visits = {}
    for name, structure in states.items():
        distances = ca_rmsd(positions, structure)
        visits[name] = StateVisit(distances, tm_score(positions, structure), float((distances < within).mean()))
    return visits


def radius_of_gyration(positions: np.ndarray) -> np.ndarray:
    """Radius of gyration [S] in Å of samples [S, N, 3], all residues alike."""
    centred = positions - positions.mean(axis=1, keepdims=True)
    return np.asarray(np.sqrt((centred**2).sum(axis=-1).mean(axis=-1)))


def contact_map(positions: np.ndarray, cutoff: float = CONTACT_DISTANCE) -> np.ndarray:
    """Fraction of samples [N, N] in which two C-alphas are nearer than `cutoff` Å."""
    n_samples, n_sites = positions.shape[:2]
    counts = np.zeros((n_sites, n_sites))
    size = max(1, _CHUNK_TERMS // n_sites**2)
    for start in range(0, n_samples, size):
        chunk = positions[start : start + size].astype(np.float64)
        counts += (np.linalg.norm(chunk[:, :, None] - chunk[:, None], axis=-1) < cutoff).sum(axis=0)
    return counts / n_samples


def soundness(
    system: System, positions: np.ndarray, rotations: np.ndarray, limits: PhysicalLimits | None = None
) -> Soundness:
    """Physical soundness of samples: positions [S, N, 3] Å, rotations [S, N, 3, 3] of a System of residues."""
    allowed = limits or PhysicalLimits()
    if rotations.shape != (*positions.shape, 3):
        raise UserError(f"{system.name!r}: rotations {rotations.shape}, expected {(*positions.shape, 3)}")
    backbone = backbone_of(system, positions, rotations)
    first, second = system.bonds[:, 0], system.bonds[:, 1]
    n, c = BACKBONE_ATOMS.index("N"), BACKBONE_ATOMS.index("C")
    peptide = np.linalg.norm(backbone[:, first, c] - backbone[:, second, n], axis=-1)
    steps = bond_lengths(positions, system.bonds)
    clashes = _atom_clashes(system, backbone, allowed.closest)
    longest_step, longest_bond = (values.max(axis=1, initial=0.0) for values in (steps, peptide))
    shortest_step = steps.min(axis=1, initial=np.inf)
    near = np.abs(steps - CA_STEP) <= CA_STEP_TOLERANCE
    return Soundness(
        ca_steps_near=near.mean(axis=1) if near.shape[1] else np.ones(len(near)),
        shortest_ca_step=shortest_step,
        longest_ca_step=longest_step,
        longest_peptide_bond=longest_bond,
        ca_clashes=_ca_clashes(system, positions),
        atom_clashes=clashes,
        sound=(longest_step < allowed.ca_step)
        & (shortest_step > allowed.shortest_ca_step)
        & (longest_bond < allowed.peptide_bond)
        & (clashes == 0),
    )


def backbone_of(system: System, positions: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """N, CA, C, O, CB [S, N, 5, 3] Å that frames imply, with ideal local geometry."""
    joined = np.zeros(system.n_sites, bool)
    joined[system.bonds[:, 0]] = True
    frames = torch.as_tensor(np.asarray(rotations, np.float64)), torch.as_tensor(np.asarray(positions, np.float64))
    return np.asarray(backbone_from_frames(*frames, torch.as_tensor(joined)).numpy())


def distance_divergence(
    positions: np.ndarray, reference: np.ndarray, trajectory: np.ndarray, pairs: np.ndarray, n_bins: int = 50
) -> DistanceDivergence:
    """Divergence of distances of `pairs` [P, 2]: samples [S, N, 3] Å against MD frames [F, N, 3] Å.

    trajectory [F] labels the MD's trajectories, frames of one adjacent and in time order; its halves are the floor. Bins
    divide the range that samples and MD span together.
    """
    in_first = first_halves(trajectory)
    if not in_first.any() or in_first.all():
        raise UserError(f"{len(reference)} frames of MD have no two halves to compare; give at least two")
    size = max(1, _CHUNK_TERMS // max(1, len(reference) + len(positions)))
    scores = [
        _divergences(bond_lengths(positions, part), bond_lengths(reference, part), in_first, n_bins)
        for part in (pairs[start : start + size] for start in range(0, len(pairs), size))
    ]
    divergence, floor = (np.concatenate(columns) for columns in zip(*scores, strict=True))
    return DistanceDivergence(pairs, divergence, floor)


def distant_pairs(system: System) -> np.ndarray:
    """All pairs [P, 2] of residues at least three apart in sequence, or in different chains."""
    first, second = np.triu_indices(system.n_sites, 1)
    far = _are_far(system, first, second)
    return np.stack([first[far], second[far]], axis=1)


def _require_same_residues(positions: np.ndarray, reference: np.ndarray) -> None:
    if positions.ndim != 3 or positions.shape[1:] != reference.shape:
        raise UserError(f"samples {positions.shape}, structure {reference.shape}: expected (S, N, 3) and (N, 3), one N")


def _tm_seeds(n: int) -> np.ndarray:
    """Fragments [K, N] from which superpositions start: the chain, its halves, quarters, ... each overlapping the next."""
    rows, length = [], n
    while True:
        starts = range(0, max(n - length, 0) + 1, max(1, length // 2))
        rows += [(np.arange(n) >= start) & (np.arange(n) < start + length) for start in starts]
        if length <= _TM_SHORTEST_SEED:
            return np.array(rows, np.float64)
        length = max(length // 2, _TM_SHORTEST_SEED)


def _tm_scale(n: int) -> float:
    """d0 in Å for a reference of n residues."""
    return max(0.5, 1.24 * float(np.cbrt(max(n - 15, 0))) - 1.8)


def _best_tm_score(sample: np.ndarray, target: np.ndarray, seeds: np.ndarray) -> float:
    """The largest score found by superposing on a seed, then again and again on the residues that came near."""
    scale = _tm_scale(len(target))
    search = float(np.clip(scale, 4.5, 8.0))
    distances = _distances_after_superposition(sample, target, seeds)
    scores = _tm_scores(distances, scale)
    best, promising = scores.max(), np.argsort(-scores)[:_TM_REFINED_SEEDS]
    weights = _nearer(distances[promising], search - 1)
    for _ in range(_TM_ITERATIONS):
        distances = _distances_after_superposition(sample, target, weights)
        best = max(best, _tm_scores(distances, scale).max())
        refined = _nearer(distances, search + 1)
        if np.array_equal(refined, weights):
            break
        weights = refined
    return float(best)


def _distances_after_superposition(sample: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Distances [K, N] in Å once the sample [N, 3] lies on the target [N, 3] by each row of weights [K, N]."""
    rotation, translation = kabsch(sample, target, weights)
    moved = sample @ np.swapaxes(rotation, -1, -2) + translation[:, None]
    return np.asarray(np.linalg.norm(moved - target, axis=-1))


def _tm_scores(distances: np.ndarray, scale: float) -> np.ndarray:
    return np.asarray((1 / (1 + (distances / scale) ** 2)).mean(axis=-1))


def _nearer(distances: np.ndarray, reach: float) -> np.ndarray:
    """Residues [K, N] nearer than `reach` Å as weights; the three nearest at least, since fewer superpose anything."""
    third = np.partition(distances, min(2, distances.shape[1] - 1), axis=-1)[:, min(2, distances.shape[1] - 1)]
    return (distances <= np.maximum(reach, third)[:, None]).astype(np.float64)


def _ca_clashes(system: System, positions: np.ndarray) -> np.ndarray:
    joined = {(int(i), int(j)) for i, j in system.bonds}
    counts = []
    for sample in positions:
        pairs = cKDTree(sample).query_pairs(CA_CLASH_DISTANCE)
        counts.append(len(pairs - joined))
    return np.array(counts, np.int64)


def _atom_clashes(system: System, backbone: np.ndarray, closest: float) -> np.ndarray:
    """Pairs [S] of backbone atoms nearer than `closest` Å in residues that are far apart in sequence."""
    residue = np.repeat(np.arange(system.n_sites), len(BACKBONE_ATOMS))
    glycine = np.array([name == "GLY" for name in system.residue_names])[residue]
    kept = ~(glycine & (np.tile(np.arange(len(BACKBONE_ATOMS)), system.n_sites) == BACKBONE_ATOMS.index("CB")))
    residue = residue[kept]
    counts = []
    for sample in backbone.reshape(len(backbone), -1, 3)[:, kept]:
        pairs = cKDTree(sample).query_pairs(closest, output_type="ndarray")
        counts.append(int(_are_far(system, residue[pairs[:, 0]], residue[pairs[:, 1]]).sum()))
    return np.array(counts, np.int64)


def _are_far(system: System, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    apart = np.abs(system.residue_index[first] - system.residue_index[second]) >= _FAR_IN_SEQUENCE
    return np.asarray(apart | (system.chain_index[first] != system.chain_index[second]))


def _divergences(
    samples: np.ndarray, reference: np.ndarray, in_first: np.ndarray, n_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    low = np.minimum(samples.min(axis=0), reference.min(axis=0))
    width = np.maximum(np.maximum(samples.max(axis=0), reference.max(axis=0)) - low, 1e-6) / n_bins

    def histograms(distances: np.ndarray) -> np.ndarray:
        bins = np.minimum((distances - low) / width, n_bins - 1).astype(np.int64)
        flat = np.arange(bins.shape[1]) * n_bins + bins
        return np.bincount(flat.ravel(), minlength=bins.shape[1] * n_bins).reshape(-1, n_bins)

    halves = histograms(reference[in_first]), histograms(reference[~in_first])
    return jensen_shannon(histograms(samples), halves[0] + halves[1]), jensen_shannon(*halves)
