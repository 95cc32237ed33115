"""Prior -> steps -> State. Walkers carry their own time, seed and index, so rows of a batch may be at different steps:
offline sampling and the continuous batching of the server are the same function, `advance`.

A walker's noise is a pure function of (seed, index, step), its result of (seed, index, steps, solver) and the network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dig_scale.batch import Context, ScoreFn, State
from dig_scale.diffusion.composition import Composition
from dig_scale.sampling.noise import counter_normal
from dig_scale.sampling.solvers import CLEAN, Memory, Solver, Step


@dataclass(frozen=True)
class Walkers:
    """Samples under way: state and solver memory; seed, index, step (done so far) and steps (in all), [B] int64 each."""

    state: State
    memory: Memory
    seed: Tensor
    index: Tensor
    step: Tensor
    steps: Tensor


def step_times(step: Tensor, steps: Tensor) -> Tensor:
    """t [B] before step number `step` of `steps`: evenly from 1 to 0 in steps - 1 intervals, then CLEAN."""
    t = 1 - step.double() / (steps - 1).clamp(min=1).double()
    return torch.where(step < steps, t.clamp(min=0), torch.full_like(t, CLEAN)).float()


def time_grid(steps: int) -> Tensor:
    """The times [steps + 1] of a walker, from 1 to 0 and CLEAN."""
    return step_times(torch.arange(steps + 1), torch.full((steps + 1,), steps))


def walker_noise(seed: Tensor, index: Tensor, step: Tensor, composition: Composition, context: Context) -> State:
    """Standard noise of every walker at its step, restricted to what may move; step 0 is the prior's."""
    return composition.noise(counter_normal(seed, index, step, composition.normals(context)), context)


def walkers_at_start(
    composition: Composition, context: Context, solver: Solver, seed: Tensor, index: Tensor, steps: Tensor
) -> Walkers:
    """Walkers drawn from the prior."""
    start = torch.zeros_like(index)
    state = composition.prior(walker_noise(seed, index, start, composition, context))
    return Walkers(state, solver.init(state), seed, index, start, steps)


def advance(score_fn: ScoreFn, composition: Composition, context: Context, solver: Solver, walkers: Walkers) -> Walkers:
    """One step of every walker; finished ones must not be among them."""
    t, t_next = step_times(walkers.step, walkers.steps), step_times(walkers.step + 1, walkers.steps)
    noise = walker_noise(walkers.seed, walkers.index, walkers.step + 1, composition, context)
    step = Step(walkers.state, context, t, t_next, noise)
    state, memory = solver.step(score_fn, composition, step, walkers.memory)
    return Walkers(state, memory, walkers.seed, walkers.index, walkers.step + 1, walkers.steps)


def finished(walkers: Walkers) -> Tensor:
    """Which walkers [B] are clean samples."""
    return walkers.step >= walkers.steps


def sample(
    score_fn: ScoreFn,
    composition: Composition,
    context: Context,
    solver: Solver,
    steps: int,
    seed: int,
    index: Tensor,
) -> State:
    """Samples of the given indices [B] int64, all in one batch."""
    seeds, counts = torch.full_like(index, seed), torch.full_like(index, steps)
    walkers = walkers_at_start(composition, context, solver, seeds, index, counts)
    for _ in range(steps):
        walkers = advance(score_fn, composition, context, solver, walkers)
    return walkers.state
