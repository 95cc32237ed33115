"""Free-energy differences between states that a user defines, as sampled, reweighted, and in reference MD.

In: an Ensemble and States (sampling.from_settings). Out: populations and differences in kT. A reweighted number always comes
with the effective number of samples that it rests on. Knows no files and no pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch

from dig_scale.batch import Geometry
from dig_scale.ensemble import Ensemble
from dig_scale.errors import UserError
from dig_scale.evaluation.distribution import Resampling
from dig_scale.evaluation.sets import Estimate, standard_error
from dig_scale.evaluation.thermodynamics import TINY_COUNT
from dig_scale.evaluation.weights import estimate_with, usable
from dig_scale.model.features import featurise
from dig_scale.sampling import reweighting
from dig_scale.sampling.collective_variables import require_sites
from dig_scale.sampling.from_settings import State

_SEED = 1


@dataclass(frozen=True)
class Reweighted:
    """A number and its error, with Kish's effective samples of the weights that it rests on, and their fraction of all."""

    value: float | None
    error: float | None
    effective_samples: float
    fraction: float


@dataclass(frozen=True)
class StateRow:
    """One state: its definition in words, samples in it, and its population in the model, reweighted, in MD."""

    name: str
    definition: str
    samples: int
    population: Estimate
    reweighted: Reweighted | None
    md: Estimate | None = None


@dataclass(frozen=True)
class Difference:
    """F_second - F_first in kT in the model, reweighted, in MD; a value is None where a state is empty."""

    first: str
    second: str
    sampled: Estimate
    reweighted: Reweighted | None
    md: Estimate | None = None


@dataclass(frozen=True)
class StateTable:
    """All states, and the differences of every two."""

    states: tuple[StateRow, ...]
    differences: tuple[Difference, ...]


def state_table(states: Sequence[State], ensemble: Ensemble) -> StateTable:
    """Populations of states and their differences, over the usable samples; raises UserError for sites that are not there.

    Samples that lie elsewhere than the model's are weighted back to it, so that all numbers of the model are its own.
    """
    kept = ensemble.take(usable(ensemble))
    masks = state_masks(states, kept)
    weights, back = (_weights_of(log, kept) for log in (kept.correcting_log_weights, kept.model_log_weights))
    log_weights, replicates = (None, None) if back is None else (back.log, back.replicates)
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    rows = tuple(
        StateRow(
            state.name,
            state.definition,
            counts[state.name],
            estimate_with(
                reweighting.weighted_average(masks[state.name].astype(float), log_weights, _SEED, replicates)
            ),
            _reweighted_population(masks[state.name], weights),
        )
        for state in states
    )
    pairs = combinations(masks, 2)
    return StateTable(rows, tuple(_difference(first, second, masks, weights, back) for first, second in pairs))


def with_reference(table: StateTable, states: Sequence[State], frames: Ensemble, resampling: Resampling) -> StateTable:
    """The table with the same numbers of MD, whose frames are given as an ensemble, with errors from its blocks."""
    masks = state_masks(states, frames)
    shares = {name: (float(mask.mean()), _replicates(mask, resampling)) for name, mask in masks.items()}
    rows = tuple(
        replace(row, md=Estimate(shares[row.name][0], standard_error(shares[row.name][1]))) for row in table.states
    )
    found = tuple(
        replace(one, md=_md_difference(shares[one.first], shares[one.second], frames.n_samples))
        for one in table.differences
    )
    return StateTable(rows, found)


def state_masks(states: Sequence[State], ensemble: Ensemble) -> Mapping[str, np.ndarray]:
    """Which samples [S] are in which state."""
    system, context = ensemble.system, featurise(ensemble.system)
    fields = (ensemble.positions, ensemble.rotations, ensemble.cell)
    geometry = Geometry(*(None if x is None else torch.as_tensor(np.asarray(x, np.float32)) for x in fields))  # type: ignore[arg-type]
    masks = {}
    for state in states:
        mask = np.ones(ensemble.n_samples, bool)
        for one in state.bounds:
            require_sites(one.prop, system.n_sites, system.name)
            with torch.no_grad():
                values = torch.as_tensor(one.prop(geometry, context))
            if values.shape != (ensemble.n_samples,):
                raise UserError(
                    f"state {state.name!r}: {one.text} gave {tuple(values.shape)}, expected one number per sample"
                )
            mask &= one.inside(values.numpy())
        masks[state.name] = mask
    return masks


@dataclass(frozen=True)
class _Weights:
    """What reweighted numbers take: log_weights [S], and factors on the weights [S, R] where errors come from them."""

    log: np.ndarray
    replicates: np.ndarray | None


def _weights_of(log_weights: np.ndarray | None, ensemble: Ensemble) -> _Weights | None:
    return None if log_weights is None else _Weights(log_weights, ensemble.replicates)


def _difference(
    first: str, second: str, masks: Mapping[str, np.ndarray], weights: _Weights | None, back: _Weights | None
) -> Difference:
    sampled = _free_energy(masks[first], masks[second], back) or Estimate(None)
    if weights is None:
        return Difference(first, second, sampled, None)
    found = _free_energy(masks[first], masks[second], weights) or Estimate(None)
    return Difference(first, second, sampled, _with_ess(found, weights))


def _free_energy(first: np.ndarray, second: np.ndarray, weights: _Weights | None) -> Estimate | None:
    counted = np.ones(len(first)) if weights is None else np.isfinite(weights.log)
    if not (counted * first).any() or not (counted * second).any():
        return None
    log, replicates = (None, None) if weights is None else (weights.log, weights.replicates)
    return estimate_with(reweighting.free_energy_difference(first, second, log, _SEED, replicates))


def _reweighted_population(mask: np.ndarray, weights: _Weights | None) -> Reweighted | None:
    if weights is None:
        return None
    values = mask.astype(float)
    found = reweighting.weighted_average(values, weights.log, _SEED, weights.replicates)
    return _with_ess(estimate_with(found), weights)


def _with_ess(found: Estimate, weights: _Weights) -> Reweighted:
    effective = reweighting.effective_sample_size(weights.log)
    return Reweighted(found.value, found.error, effective, effective / len(weights.log))


def _replicates(mask: np.ndarray, resampling: Resampling) -> np.ndarray:
    return np.asarray(resampling.means(mask.astype(float), np.full(len(mask), 1 / len(mask))))


def _md_difference(first: tuple[float, np.ndarray], second: tuple[float, np.ndarray], frames: int) -> Estimate:
    if not first[0] or not second[0]:
        return Estimate(None)
    tiny = TINY_COUNT / frames
    replicates = np.log((first[1] + tiny) / (second[1] + tiny))
    return Estimate(float(np.log(first[0] / second[0])), standard_error(replicates))
