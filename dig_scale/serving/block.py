"""One batch of samples as config.Sample asks for it: plain, guided towards a property, or steered as one population.

In: a Bench, the settings, the samples' indices. Out: float arrays by name, [n, ...] for what is of every sample, as parts of
ensembles keep them. Knows no files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dig_scale.batch import ScoreFn, State
from dig_scale.config import Sample
from dig_scale.sampling.from_settings import guide_from, steering_from
from dig_scale.sampling.guidance import property_guided
from dig_scale.sampling.integrate import sample
from dig_scale.sampling.solvers import solver_named
from dig_scale.sampling.steering import Run, Steered, steer
from dig_scale.serving.served import Bench
from dig_scale.system import System

POPULATION = ("ess", "resampled", "log_normaliser", "distinct")
"""Arrays of a steered population that are not of every sample."""


def require_properties(settings: Sample, system: System) -> None:
    """Raises UserError where guide or steering name something that is not there."""
    if settings.guide is not None:
        guide_from(settings.guide, system)
    if settings.steer is not None:
        steering_from(settings.steer, system)


def draw_block(bench: Bench, settings: Sample, index: np.ndarray) -> dict[str, np.ndarray]:
    """The samples of these indices [n] int64: fields of Frames, and weights and the course of the population where steered."""
    rows = torch.as_tensor(index, device=bench.context.present.device)
    with torch.inference_mode():
        if settings.steer is None:
            solver = solver_named(settings.solver)
            steps, seed, score_fn = settings.steps, settings.seed, _guided(bench, settings)
            state = sample(score_fn, bench.composition, bench.context, solver, steps, seed, rows)
            return _arrays(bench, state)
        steered = _steered(bench, settings, rows)
        return _arrays(bench, steered.state) | _weights(steered)


def _guided(bench: Bench, settings: Sample) -> ScoreFn:
    if settings.guide is None:
        return bench.score_fn
    return property_guided(bench.score_fn, bench.composition, [guide_from(settings.guide, bench.system)])


def _steered(bench: Bench, settings: Sample, rows: Tensor) -> Steered:
    assert settings.steer is not None
    potential, steering = steering_from(settings.steer, bench.system)
    run = Run(solver_named(settings.solver), settings.steps, settings.seed, rows)
    return steer(_guided(bench, settings), bench.composition, bench.context, potential, steering, run)


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
