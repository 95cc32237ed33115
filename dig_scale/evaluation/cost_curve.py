"""Error against cost: how far model, reweighted model and MD are from the MD after the same CPU seconds.

In: measurements of samples and of MD frames, and what they cost. Out: a CostCurve. Everything is compared with the second halves
of the trajectories, so that MD (the first halves, cut ever longer) is not compared with itself. Of the model's samples the
first so many are taken, as drawing them would have given them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dig_scale.evaluation import distribution
from dig_scale.evaluation.cost import Costs
from dig_scale.evaluation.reference import first_halves
from dig_scale.evaluation.sets import Observables, SampleSet, Topology
from dig_scale.evaluation.thermodynamics import kish_ess

_POINTS = 8
_FEWEST = 20


@dataclass(frozen=True)
class CostPoint:
    """So many samples or frames cost cpu_seconds (None: not recorded) and are `divergence` nat off; with_training adds the
    training. effective_samples is Kish's; MD has none."""

    samples: int
    cpu_seconds: float | None
    with_training: float | None
    divergence: float
    effective_samples: float | None = None


@dataclass(frozen=True)
class CostCurve:
    """Mean Jensen-Shannon divergence to the second halves of the MD, of what `about` says, as cost grows."""

    about: str
    model: tuple[CostPoint, ...]
    reweighted: tuple[CostPoint, ...]
    md: tuple[CostPoint, ...]


@dataclass(frozen=True)
class _Histograms:
    """Bin indices [F] of every map or torsion of one set, and how many bins each has."""

    indices: tuple[np.ndarray, ...]
    bins: int

    def divergence(self, rows: np.ndarray, weights: np.ndarray, other: Sequence[np.ndarray]) -> float:
        found = [
            distribution.jensen_shannon(distribution.counts(index[rows], self.bins, weights), reference)
            for index, reference in zip(self.indices, other, strict=True)
        ]
        return float(np.mean(found))


def cost_curve(
    topology: Topology, sets: dict[str, SampleSet], trajectory: np.ndarray, costs: Costs, bins: int
) -> CostCurve | None:
    """The curve of an ensemble in the order of its samples; None where no torsion is compared or no cost is known."""
    if costs.sampling_cpu_seconds is None and costs.md_cpu_seconds is None:
        return None
    measure = _measure(topology, bins)
    if measure is None:
        return None
    about, histograms = measure
    model, md = histograms(sets["model"].observables), histograms(sets["md"].observables)
    first = first_halves(trajectory)
    second = np.flatnonzero(~first)
    reference = [distribution.counts(index[second], md.bins, _equal(len(second))) for index in md.indices]
    return CostCurve(
        about,
        _model_points(model, reference, sets["model"].weights, costs.sampling_cpu_seconds, costs),
        _model_points(model, reference, sets["reweighted"].weights, _with_weighting(costs), costs)
        if "reweighted" in sets
        else (),
        _md_points(md, reference, trajectory, first, costs),
    )


def _measure(topology: Topology, bins: int) -> tuple[str, Callable[[Observables], _Histograms]] | None:
    if topology.pairs:

        def of_maps(seen: Observables) -> _Histograms:
            pairs = [(seen.torsions[:, pair.first], seen.torsions[:, pair.second]) for pair in topology.pairs]
            return _Histograms(tuple(distribution.map_bins(a, b, bins) for a, b in pairs), bins**2)

        return f"{len(topology.pairs)} torsion pairs" if len(topology.pairs) > 1 else "the torsion pair", of_maps
    if topology.torsions:

        def of_torsions(seen: Observables) -> _Histograms:
            return _Histograms(tuple(distribution.circular_bins(x, bins) for x in seen.torsions.T), bins)

        return f"{len(topology.torsions)} torsions", of_torsions
    return None


def _model_points(
    model: _Histograms, reference: Sequence[np.ndarray], weights: np.ndarray, seconds: float | None, costs: Costs
) -> tuple[CostPoint, ...]:
    total = len(weights)
    points = []
    for count in _grid(total):
        rows = np.arange(count)
        own = weights[:count]
        if not own.sum() > 0:
            continue
        spent = None if seconds is None else seconds * count / total
        trained = None if spent is None or costs.training_cpu_seconds is None else spent + costs.training_cpu_seconds
        off = model.divergence(rows, own / own.sum(), reference)
        points.append(CostPoint(count, spent, trained, off, _effective(own)))
    return tuple(points)


def _with_weighting(costs: Costs) -> float | None:
    """CPU seconds of sampling and of weights."""
    if costs.sampling_cpu_seconds is None or costs.weighting_cpu_seconds is None:
        return None
    return costs.sampling_cpu_seconds + costs.weighting_cpu_seconds


def _md_points(
    md: _Histograms, reference: Sequence[np.ndarray], trajectory: np.ndarray, first: np.ndarray, costs: Costs
) -> tuple[CostPoint, ...]:
    halves = [np.flatnonzero(first & (trajectory == label)) for label in np.unique(trajectory)]
    longest = max(len(half) for half in halves)
    points = []
    for length in _grid(longest):
        rows = np.concatenate([half[: round(len(half) * length / longest)] for half in halves])
        spent = None if costs.md_cpu_seconds is None else costs.md_cpu_seconds * len(rows) / len(trajectory)
        points.append(CostPoint(len(rows), spent, None, md.divergence(rows, _equal(len(rows)), reference)))
    return tuple(points)


def _grid(total: int) -> list[int]:
    """Sample counts up to all, evenly spaced in their logarithm."""
    if total < _FEWEST:
        return [total] if total else []
    return sorted({round(float(count)) for count in np.geomspace(max(_FEWEST, total / 128), total, _POINTS)})


def _equal(count: int) -> np.ndarray:
    return np.full(count, 1 / count)


def _effective(weights: np.ndarray) -> float:
    with np.errstate(divide="ignore"):
        return kish_ess(np.log(weights))
