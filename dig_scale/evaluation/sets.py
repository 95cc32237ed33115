"""The sets of conformations that a report sets side by side, and numbers measured on each of them.

Every number of the model stands beside the same number for MD against MD, so there are five sets of one kind: `model`,
`md`, its `first_half` and `second_half` (by time within each trajectory), and `subsample`, as many frames as the model has
samples, drawn from the MD with replacement. A sixth, `reweighted`, is the model with its Boltzmann weights, if it has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dig_scale.evaluation import structure
from dig_scale.evaluation.distribution import Resampling, block_resampling, independent_resampling
from dig_scale.evaluation.reference import first_halves
from dig_scale.evaluation.structure import Torsion, TorsionPair
from dig_scale.evaluation.thermodynamics import normalised_weights
from dig_scale.system import System

MIN_BLOCKS = 20
"""Blocks of MD at least, even if that makes them shorter than BLOCK_INEFFICIENCIES asks."""
BLOCK_INEFFICIENCIES = 10
"""Block length in statistical inefficiencies; the error of an error bar from cutting correlations at block ends is 1/10."""
MAX_MD_BLOCKS = 1000


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error (bootstrap); None where it is not determined."""

    value: float | None
    error: float | None = None


BySet = dict[str, Estimate]


@dataclass(frozen=True)
class Topology:
    """What is measured on a system: torsions, pairs of them, angles [A, 3]; bonds and centres are the System's."""

    system: System
    torsions: tuple[Torsion, ...]
    pairs: tuple[TorsionPair, ...]
    angles: np.ndarray


@dataclass(frozen=True)
class Observables:
    """Measurements per frame: torsions [F, T] and angles [F, A] rad, bonds [F, E] Å, clashes [F], energy [F] eV.

    upright [F, C] is True where a stereocentre is as it should be.
    """

    torsions: np.ndarray
    bonds: np.ndarray
    angles: np.ndarray
    upright: np.ndarray
    clashes: np.ndarray
    energy: np.ndarray | None

    def take(self, frames: np.ndarray) -> Observables:
        """The measurements of some frames (indices or mask)."""
        return Observables(
            torsions=self.torsions[frames],
            bonds=self.bonds[frames],
            angles=self.angles[frames],
            upright=self.upright[frames],
            clashes=self.clashes[frames],
            energy=None if self.energy is None else self.energy[frames],
        )


@dataclass(frozen=True)
class SampleSet:
    """One set: its measurements, weights [F] (sum 1), and its bootstrap, None for the sets that are themselves yardsticks."""

    observables: Observables
    weights: np.ndarray
    resampling: Resampling | None

    @property
    def n_frames(self) -> int:
        """Number of frames F."""
        return len(self.weights)


def topology_of(system: System) -> Topology:
    """Everything measured on `system`, from its bonds and names."""
    torsions = structure.torsions_of(system)
    return Topology(system, torsions, structure.torsion_pairs(torsions), structure.angles_of(system))


def observe(positions: np.ndarray, topology: Topology, energy: np.ndarray | None) -> Observables:
    """Measurements of positions [F, N, 3] Å."""
    system = topology.system
    quadruples = np.array([torsion.sites for torsion in topology.torsions], dtype=np.int64).reshape(-1, 4)
    return Observables(
        torsions=structure.dihedrals(positions, quadruples),
        bonds=structure.bond_lengths(positions, system.bonds),
        angles=structure.bend_angles(positions, topology.angles),
        upright=structure.signed_volumes(positions, system.stereocentres) > 0,
        clashes=structure.clash_counts(positions, system),
        energy=energy,
    )


def md_resampling(
    trajectory: np.ndarray, inefficiency: float, replicates: int, generator: np.random.Generator
) -> Resampling:
    """Block bootstrap of MD frames: blocks of BLOCK_INEFFICIENCIES statistical inefficiencies, within bounds on their number."""
    n_frames = len(trajectory)
    longest = max(1, n_frames // MIN_BLOCKS)
    wanted = max(int(np.ceil(BLOCK_INEFFICIENCIES * inefficiency)), -(-n_frames // MAX_MD_BLOCKS))
    return block_resampling(trajectory, min(wanted, longest), replicates, generator)


@dataclass(frozen=True)
class ModelWeights:
    """log-weights [S] of a model's samples: back to the model's own distribution, where they lie elsewhere, and towards
    exp(-u), where these are known."""

    to_the_model: np.ndarray | None = None
    boltzmann: np.ndarray | None = None


def sample_sets(
    model: Observables,
    md: Observables,
    trajectory: np.ndarray,
    weights: ModelWeights,
    md_blocks: Resampling,
    generator: np.random.Generator,
) -> dict[str, SampleSet]:
    """The five or six sets by name; md is ordered by trajectory and time."""
    n_samples, n_frames = len(model.clashes), len(md.clashes)
    first = first_halves(trajectory)
    drawn = generator.integers(n_frames, size=n_samples)
    model_blocks = independent_resampling(n_samples, len(md_blocks.draws), generator)
    sets = {
        "model": _weighted(_uniform(model, model_blocks), weights.to_the_model),
        "md": _uniform(md, md_blocks),
        "first_half": _uniform(md.take(first), None),
        "second_half": _uniform(md.take(~first), None),
        "subsample": _uniform(md.take(drawn), None),
    }
    if weights.boltzmann is None:
        return sets
    return sets | {"reweighted": _weighted(sets["model"], weights.boltzmann)}


def mean_by_set(sets: dict[str, SampleSet], value: Callable[[Observables], npt.ArrayLike]) -> BySet:
    """Mean over frames of a number per frame [F] in every set, with a standard error where the set has a bootstrap."""
    return {name: _mean(one, np.asarray(value(one.observables), np.float64)) for name, one in sets.items()}


def standard_error(replicates: np.ndarray) -> float | None:
    """Standard deviation of bootstrap replicates [B]; None from fewer than two."""
    return float(np.std(replicates, ddof=1)) if len(replicates) > 1 else None


def _weighted(one: SampleSet, log_weights: np.ndarray | None) -> SampleSet:
    return one if log_weights is None else replace(one, weights=normalised_weights(log_weights))


def _uniform(observables: Observables, resampling: Resampling | None) -> SampleSet:
    n_frames = len(observables.clashes)
    return SampleSet(observables, np.full(n_frames, 1 / n_frames), resampling)


def _mean(one: SampleSet, values: np.ndarray) -> Estimate:
    mean = float(values @ one.weights)
    # A value that never varies says nothing of its error: a bootstrap of zeros is zero.
    if one.resampling is None or values.min() == values.max():
        return Estimate(mean)
    return Estimate(mean, standard_error(one.resampling.means(values, one.weights)))
