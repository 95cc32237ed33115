"""Torsion distributions, model against MD: divergences, Ramachandran maps, basin populations.

In: the sets of `sets.py`. Out: frozen dataclasses; fields marked PICTURE are arrays for the pictures only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dig_scale.evaluation import distribution, thermodynamics
from dig_scale.evaluation.sets import BySet, Estimate, Observables, SampleSet, Topology, mean_by_set, standard_error
from dig_scale.evaluation.structure import TorsionPair
from dig_scale.units import EV_PER_KJ_MOL, thermal_energy

PICTURE = {"picture": True}
"""Metadata of fields that report.json leaves out."""


@dataclass(frozen=True)
class Distance:
    """A Jensen-Shannon divergence in nat: model to MD, and MD to itself as two halves and as a same-size subsample."""

    model: float
    model_error: float | None
    halves: float
    subsample: float
    reweighted: float | None = None


@dataclass(frozen=True)
class BasinRow:
    """One basin: population and ΔF by set (kT, kJ/mol; relative to the basin that is fullest in MD), frames and arrivals."""

    name: str
    definition: str
    population: BySet
    free_energy_kt: BySet
    free_energy_kj_mol: BySet
    model_minus_md_kt: Estimate
    md_frames: int
    model_frames: int
    md_arrivals: int


@dataclass(frozen=True)
class MapComparison:
    """A pair of torsions on a square map; counts are histograms [bins²] that sum to 1."""

    label: str
    first: str
    second: str
    divergence: Distance
    occupied_bins: int
    basins: tuple[BasinRow, ...]
    md_histogram: np.ndarray = field(metadata=PICTURE)
    model_histogram: np.ndarray = field(metadata=PICTURE)


@dataclass(frozen=True)
class Curve:
    """A 1-D histogram [K] that sums to 1, with the edges of its 95 % bootstrap band."""

    histogram: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


@dataclass(frozen=True)
class TorsionComparison:
    """One torsion's distribution in bins from -pi to pi."""

    label: str
    symbol: str
    divergence: Distance
    md: Curve = field(metadata=PICTURE)
    model: Curve = field(metadata=PICTURE)


def divergence_by_bins(
    sets: dict[str, SampleSet],
    bins: Callable[[Observables], np.ndarray],
    n_bins: int,
    generator: np.random.Generator,
) -> Distance:
    """Distance between the sets' histograms of a bin index per frame; the subsample is a mean over many draws."""
    histograms = {name: histogram_of(one, bins, n_bins) for name, one in sets.items()}
    replicates = [replicates_of(sets[name], bins, n_bins) for name in ("model", "md")]
    js, n_replicates = distribution.jensen_shannon, len(replicates[0])
    return Distance(
        model=float(js(histograms["model"], histograms["md"])),
        model_error=standard_error(js(*replicates)),
        halves=float(js(histograms["first_half"], histograms["second_half"])),
        subsample=distribution.resampled_divergence(histograms["md"], sets["model"].n_frames, n_replicates, generator),
        reweighted=float(js(histograms["reweighted"], histograms["md"])) if "reweighted" in sets else None,
    )


def histogram_of(one: SampleSet, bins: Callable[[Observables], np.ndarray], n_bins: int) -> np.ndarray:
    """Histogram [n_bins] of a set, summing to 1."""
    return distribution.counts(bins(one.observables), n_bins, one.weights)


def replicates_of(one: SampleSet, bins: Callable[[Observables], np.ndarray], n_bins: int) -> np.ndarray:
    """Bootstrap histograms [B, n_bins] of a set that has a bootstrap."""
    if one.resampling is None:
        raise ValueError("this set has no bootstrap; only the model and the whole MD do")
    return one.resampling.counts(bins(one.observables), n_bins, one.weights)


def compare_torsion(
    index: int, topology: Topology, sets: dict[str, SampleSet], n_bins: int, generator: np.random.Generator
) -> TorsionComparison:
    """Distribution of one torsion in model and MD."""

    def bins(observables: Observables) -> np.ndarray:
        return distribution.circular_bins(observables.torsions[:, index], n_bins)

    torsion = topology.torsions[index]
    return TorsionComparison(
        label=torsion.label,
        symbol=torsion.symbol,
        divergence=divergence_by_bins(sets, bins, n_bins, generator),
        md=_curve(sets["md"], bins, n_bins),
        model=_curve(sets["model"], bins, n_bins),
    )


def compare_map(
    pair: TorsionPair,
    topology: Topology,
    sets: dict[str, SampleSet],
    trajectory: np.ndarray,
    temperature: float,
    n_bins: int,
    generator: np.random.Generator,
) -> MapComparison:
    """Joint distribution of two torsions in model and MD; basins where they are φ and ψ."""

    def bins(observables: Observables) -> np.ndarray:
        first, second = observables.torsions[:, pair.first], observables.torsions[:, pair.second]
        return distribution.map_bins(first, second, n_bins)

    md_histogram = histogram_of(sets["md"], bins, n_bins**2)
    return MapComparison(
        label=pair.label,
        first=topology.torsions[pair.first].label,
        second=topology.torsions[pair.second].label,
        divergence=divergence_by_bins(sets, bins, n_bins**2, generator),
        occupied_bins=int((md_histogram > 0).sum()),
        basins=_basin_rows(pair, sets, trajectory, temperature) if pair.is_ramachandran else (),
        md_histogram=md_histogram,
        model_histogram=histogram_of(sets["model"], bins, n_bins**2),
    )


def _curve(one: SampleSet, bins: Callable[[Observables], np.ndarray], n_bins: int) -> Curve:
    replicates = replicates_of(one, bins, n_bins)
    lower, upper = distribution.band(replicates / replicates.sum(axis=1, keepdims=True))
    return Curve(histogram_of(one, bins, n_bins), lower, upper)


def _basin_rows(
    pair: TorsionPair, sets: dict[str, SampleSet], trajectory: np.ndarray, temperature: float
) -> tuple[BasinRow, ...]:
    def assigned(observables: Observables) -> np.ndarray:
        return thermodynamics.assign_basins(observables.torsions[:, pair.first], observables.torsions[:, pair.second])

    n_basins = len(thermodynamics.BASINS)
    md = sets["md"].observables.torsions
    arrivals = thermodynamics.count_arrivals(md[:, pair.first], md[:, pair.second], trajectory)
    frames = {name: np.bincount(assigned(sets[name].observables), minlength=n_basins) for name in ("md", "model")}

    def population(k: int) -> BySet:
        return mean_by_set(sets, lambda o: assigned(o) == k)

    energies = _free_energies(sets, assigned, base=int(frames["md"].argmax()))
    kj_mol = thermal_energy(temperature) / EV_PER_KJ_MOL
    return tuple(
        BasinRow(
            name=basin.name,
            definition=basin.definition,
            population=population(k),
            free_energy_kt=energies[k],
            free_energy_kj_mol={name: _scaled(estimate, kj_mol) for name, estimate in energies[k].items()},
            model_minus_md_kt=_difference(energies[k]["model"], energies[k]["md"]),
            md_frames=int(frames["md"][k]),
            model_frames=int(frames["model"][k]),
            md_arrivals=int(arrivals[k]),
        )
        for k, basin in enumerate(thermodynamics.BASINS)
    )


def _free_energies(sets: dict[str, SampleSet], assigned: Callable[[Observables], np.ndarray], base: int) -> list[BySet]:
    """ΔF in kT of every basin, by set."""
    n_basins = len(thermodynamics.BASINS)
    rows: list[BySet] = [{} for _ in range(n_basins)]
    for name, one in sets.items():
        values = thermodynamics.free_energy_differences(histogram_of(one, assigned, n_basins), base)
        errors: np.ndarray | list[None] = [None] * n_basins
        if one.resampling is not None and len(one.resampling.draws) > 1:
            replicates = replicates_of(one, assigned, n_basins) * one.n_frames
            errors = thermodynamics.free_energy_errors(replicates, base)
        for k in range(n_basins):
            rows[k][name] = _determined(values[k], None if k == base else errors[k])
    return rows


def _determined(value: float, error: float | None) -> Estimate:
    if not np.isfinite(value):
        return Estimate(None)
    return Estimate(float(value) + 0.0, None if error is None else float(error))


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(*(None if x is None else x * factor for x in (estimate.value, estimate.error)))


def _difference(first: Estimate, second: Estimate) -> Estimate:
    if first.value is None or second.value is None:
        return Estimate(None)
    known = first.error is not None and second.error is not None
    return Estimate(first.value - second.value, math.hypot(first.error or 0, second.error or 0) if known else None)
