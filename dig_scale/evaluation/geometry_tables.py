"""Bond lengths, angles, stereocentres, clashes and energies, model against MD.

In: the sets of `sets.py`. Out: frozen dataclasses; Å, degrees, kJ/mol; fractions are means with bootstrap errors.
A bond or angle is "off" when it departs from its MD mean by more than the table's tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dig_scale.evaluation import distribution
from dig_scale.evaluation.sets import BySet, Observables, SampleSet, Topology, mean_by_set
from dig_scale.evaluation.torsion_tables import PICTURE, Distance, divergence_by_bins, histogram_of
from dig_scale.system import System
from dig_scale.units import EV_PER_KJ_MOL

BOND_TOLERANCE = 0.2
"""Å."""
ANGLE_TOLERANCE = 25.0
"""Degrees."""
_CURVE_BINS = (12, 60)
"""Fewest and most bins of a picture's histogram; between them, the square root of the number of frames."""


@dataclass(frozen=True)
class Term:
    """One bond or angle: mean and standard deviation by set, and its two histograms [K] between `edges` [K + 1]."""

    label: str
    mean: dict[str, float]
    standard_deviation: dict[str, float]
    edges: np.ndarray = field(metadata=PICTURE)
    md_histogram: np.ndarray = field(metadata=PICTURE)
    model_histogram: np.ndarray = field(metadata=PICTURE)


@dataclass(frozen=True)
class Shift:
    """Largest difference between two sets, and the term that has it."""

    value: float
    term: str


@dataclass(frozen=True)
class GeometryTable:
    """All bonds (or all angles) of a system."""

    kind: str
    unit: str
    tolerance: float
    terms: tuple[Term, ...]
    largest_shift: dict[str, Shift]
    """Between means; keys model (to MD), halves (to each other), subsample (to MD)."""
    largest_spread_change: dict[str, Shift]
    """Between standard deviations; the same keys."""
    terms_off: BySet
    """Fraction of all terms in all frames that are off."""
    frames_off: BySet
    """Fraction of frames with any term off."""


@dataclass(frozen=True)
class StereoCentre:
    """Fraction of frames in which one stereocentre is as it should be."""

    label: str
    correct: BySet


@dataclass(frozen=True)
class StereoTable:
    """Fraction of frames with every stereocentre as it should be, and per centre."""

    all_correct: BySet
    centres: tuple[StereoCentre, ...]


@dataclass(frozen=True)
class ClashTable:
    """Fraction of frames with a clash, and clashes per frame."""

    frames_with_clash: BySet
    clashes_per_frame: BySet


@dataclass(frozen=True)
class EnergyTable:
    """Potential energy in kJ/mol: mean and standard deviation by set, divergence, share of the model above MD's highest."""

    mean: BySet
    standard_deviation: dict[str, float]
    divergence: Distance
    above_md_highest: float
    edges: np.ndarray = field(metadata=PICTURE)
    md_histogram: np.ndarray = field(metadata=PICTURE)
    model_histogram: np.ndarray = field(metadata=PICTURE)


def bond_table(topology: Topology, sets: dict[str, SampleSet]) -> GeometryTable | None:
    """Bond lengths in Å; None when the system lists no bonds."""
    labels = [_term_label(topology.system, bond) for bond in topology.system.bonds]
    return _geometry_table(_Kind("bond", "Å", BOND_TOLERANCE, lambda o: o.bonds), labels, sets) if labels else None


def angle_table(topology: Topology, sets: dict[str, SampleSet]) -> GeometryTable | None:
    """Bond angles in degrees; None when the system has none."""
    labels = [_term_label(topology.system, triple) for triple in topology.angles]
    kind = _Kind("angle", "°", ANGLE_TOLERANCE, lambda o: np.degrees(o.angles))
    return _geometry_table(kind, labels, sets) if labels else None


def stereo_table(topology: Topology, sets: dict[str, SampleSet]) -> StereoTable | None:
    """Stereochemistry of the System's stereocentres; None when it has none."""
    centres = topology.system.stereocentres
    if not len(centres):
        return None

    def centre(index: int) -> StereoCentre:
        label = topology.system.site_label(int(centres[index, 0]))
        return StereoCentre(label, mean_by_set(sets, lambda o: o.upright[:, index]))

    per_centre = tuple(centre(index) for index in range(len(centres)))
    return StereoTable(mean_by_set(sets, lambda o: o.upright.all(axis=1)), per_centre)


def clash_table(sets: dict[str, SampleSet]) -> ClashTable:
    """Clashes as structure.clash_counts defines them."""
    return ClashTable(mean_by_set(sets, lambda o: o.clashes > 0), mean_by_set(sets, lambda o: o.clashes))


def energy_table(sets: dict[str, SampleSet], generator: np.random.Generator) -> EnergyTable | None:
    """Potential energies; None unless model and MD both have them."""
    model, md = sets["model"].observables.energy, sets["md"].observables.energy
    if model is None or md is None:
        return None
    low, high = np.percentile(np.concatenate([model, md]) / EV_PER_KJ_MOL, [0.5, 99.5])
    high, n_bins = max(high, low + 1e-3), _curve_bins(model, md)

    def kj_mol(observables: Observables) -> np.ndarray:
        return np.asarray(observables.energy, np.float64) / EV_PER_KJ_MOL

    def bins(observables: Observables) -> np.ndarray:
        return distribution.linear_bins(kj_mol(observables), low, high, n_bins)

    return EnergyTable(
        mean=mean_by_set(sets, kj_mol),
        standard_deviation={name: _weighted_std(kj_mol(one.observables), one.weights) for name, one in sets.items()},
        divergence=divergence_by_bins(sets, bins, n_bins, generator),
        above_md_highest=float((model > md.max()).mean()),
        edges=np.linspace(low, high, n_bins + 1),
        md_histogram=histogram_of(sets["md"], bins, n_bins),
        model_histogram=histogram_of(sets["model"], bins, n_bins),
    )


@dataclass(frozen=True)
class _Kind:
    name: str
    unit: str
    tolerance: float
    values: Callable[[Observables], np.ndarray]


def _geometry_table(kind: _Kind, labels: list[str], sets: dict[str, SampleSet]) -> GeometryTable:
    values = {name: kind.values(one.observables) for name, one in sets.items()}
    means = {name: values[name].T @ one.weights for name, one in sets.items()}
    deviations = {name: np.sqrt(one.weights @ (values[name] - means[name]) ** 2) for name, one in sets.items()}

    def off(observables: Observables) -> np.ndarray:
        return np.abs(kind.values(observables) - means["md"]) > kind.tolerance

    return GeometryTable(
        kind=kind.name,
        unit=kind.unit,
        tolerance=kind.tolerance,
        terms=tuple(_term(t, label, means, deviations, values) for t, label in enumerate(labels)),
        largest_shift=_largest_differences(means, labels),
        largest_spread_change=_largest_differences(deviations, labels),
        terms_off=mean_by_set(sets, lambda o: off(o).mean(axis=1)),
        frames_off=mean_by_set(sets, lambda o: off(o).any(axis=1)),
    )


def _term(
    index: int,
    label: str,
    means: dict[str, np.ndarray],
    deviations: dict[str, np.ndarray],
    values: dict[str, np.ndarray],
) -> Term:
    model, md = values["model"][:, index], values["md"][:, index]
    low, high = np.percentile(np.concatenate([model, md]), [0.2, 99.8])
    # A constrained bond has no width of its own: give the picture one.
    margin = max(0.1 * (high - low), 0.005 * abs(high), 1e-3)
    n_bins = _curve_bins(model, md)
    edges = np.linspace(low - margin, high + margin, n_bins + 1)
    histograms = [
        distribution.counts(distribution.linear_bins(x, edges[0], edges[-1], n_bins), n_bins) / len(x)
        for x in (md, model)
    ]
    return Term(
        label=label,
        mean={name: float(x[index]) for name, x in means.items()},
        standard_deviation={name: float(x[index]) for name, x in deviations.items()},
        edges=edges,
        md_histogram=histograms[0],
        model_histogram=histograms[1],
    )


def _largest_differences(values: dict[str, np.ndarray], labels: list[str]) -> dict[str, Shift]:
    compared = {"model": ("model", "md"), "halves": ("first_half", "second_half"), "subsample": ("subsample", "md")}
    differences = {key: np.abs(values[first] - values[second]) for key, (first, second) in compared.items()}
    return {key: Shift(float(x.max()), labels[int(x.argmax())]) for key, x in differences.items()}


def _curve_bins(model: np.ndarray, md: np.ndarray) -> int:
    return int(np.clip(np.sqrt(min(len(model), len(md))), *_CURVE_BINS))


def _term_label(system: System, sites: np.ndarray) -> str:
    """As in 'N–CA ALA2', with the residues of a term that spans two."""
    names = "–".join(system.atom_names[site] for site in sites)
    residues = dict.fromkeys(f"{system.residue_names[site]}{int(system.residue_index[site]) + 1}" for site in sites)
    return f"{names} {'–'.join(residues)}"


def _weighted_std(values: np.ndarray, weights: np.ndarray) -> float:
    mean = values @ weights
    return float(np.sqrt((values - mean) ** 2 @ weights))
