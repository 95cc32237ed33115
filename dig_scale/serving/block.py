"""One batch of samples as config.Sample asks for it: plain, guided towards a property, or steered as one population.

In: a Bench, the settings, the predictor that guides if one does, the samples' indices. Out: float arrays by name, [n, ...] for
what is of every sample, as parts of ensembles keep them. Knows no files of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dig_scale.batch import ScoreFn, State, collate
from dig_scale.config import Sample
from dig_scale.config_properties import predictor_of
from dig_scale.sampling.from_settings import guide_from, steering_from
from dig_scale.sampling.guidance import property_guided
from dig_scale.sampling.integrate import sample
from dig_scale.sampling.solvers import solver_named
from dig_scale.sampling.steering import Run, Steered, steer
from dig_scale.serving.predictors import ServedPredictor, guide_with, load_predictor
from dig_scale.serving.served import Bench
from dig_scale.system import System

POPULATION = ("ess", "resampled", "log_normaliser", "distinct")
"""Arrays of a steered population that are not of every sample."""


def require_properties(settings: Sample, system: System) -> None:
    """Raises UserError where guide or steering name something that is not there; predictors are their own affair."""
    if settings.guide is not None and predictor_of(settings.guide) is None:
        guide_from(settings.guide, system)
    if settings.steer is not None:
        steering_from(settings.steer, system)


def draw_block(
    bench: Bench, settings: Sample, index: np.ndarray, predictor: ServedPredictor | None = None
) -> dict[str, np.ndarray]:
    """The samples of these indices [n] int64: fields of Frames, and weights and the course of the population where steered.

    A predictor that guides is read from its folder where it is not given.
    """
    rows = torch.as_tensor(index, device=bench.context.present.device)
    score_fn = _guided(bench, settings, predictor)  # not under inference mode: gradients pass through what it holds
    with torch.inference_mode():
        if settings.steer is None:
            return _plain(replace(bench, score_fn=score_fn), settings, rows)
        steered = _steered(bench, score_fn, settings, rows)
        return _arrays(bench, steered.state) | _weights(steered)


def draw_blocks(
    benches: Sequence[Bench], settings: Sample, indices: Sequence[np.ndarray]
) -> list[dict[str, np.ndarray]]:
    """The plain samples of several systems of one kind and number of sites as one batch, for each what draw_block gives."""
    context = collate([bench.context for bench, index in zip(benches, indices, strict=True) for _ in index])
    rows = torch.as_tensor(np.concatenate(indices), device=context.present.device)
    with torch.inference_mode():
        arrays = _plain(replace(benches[0], context=context), settings, rows)
    ends = np.cumsum([len(index) for index in indices])
    return [
        {name: x[end - len(index) : end] for name, x in arrays.items()}
        for end, index in zip(ends, indices, strict=True)
    ]


def _guided(bench: Bench, settings: Sample, predictor: ServedPredictor | None) -> ScoreFn:
    if settings.guide is None:
        return bench.score_fn
    found = predictor or load_predictor(settings.guide, bench.context.present.device)
    if found is None:
        guide = guide_from(settings.guide, bench.system)
    else:
        guide = guide_with(found, settings.guide, bench.system, bench.composition)
    return property_guided(bench.score_fn, bench.composition, [guide])


def _steered(bench: Bench, score_fn: ScoreFn, settings: Sample, rows: Tensor) -> Steered:
    assert settings.steer is not None
    potential, steering = steering_from(settings.steer, bench.system)
    run = Run(solver_named(settings.solver), settings.steps, settings.seed, rows)
    return steer(score_fn, bench.composition, bench.context, potential, steering, run)


def _plain(bench: Bench, settings: Sample, rows: Tensor) -> dict[str, np.ndarray]:
    solver = solver_named(settings.solver)
    return _arrays(
        bench, sample(bench.score_fn, bench.composition, bench.context, solver, settings.steps, settings.seed, rows)
    )


def _arrays(bench: Bench, state: State) -> dict[str, np.ndarray]:
    arrays = bench.composition.arrays(state, bench.context)
    return {name: value.float().cpu().numpy() for name, value in arrays.items()}


def _weights(steered: Steered) -> dict[str, np.ndarray]:
    found = {"log_weights": steered.log_weights, "bias": steered.bias, "ess": steered.ess}
    course: dict[str, Any] = {
        "resampled": np.array(steered.resampled, np.int64),
        "log_normaliser": np.array(steered.log_normaliser),
        "distinct": np.array(steered.distinct),
    }
    return {name: value.cpu().numpy() for name, value in found.items()} | course
