"""The walkers of one group between steps: tensors, with a label (request, sample) for every row.

In: a pool, a tick and the jobs it serves. Out: the pool after one `sampling.integrate.advance` of the chosen rows, and
the samples that are finished. Rows not in the tick wait untouched. It knows no threads, no queue and no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np
import torch

from dig_scale.sampling.integrate import Walkers, advance, finished, walkers_at_start
from dig_scale.sampling.solvers import Solver
from dig_scale.serving.scheduler import Job, Tick, Walker
from dig_scale.serving.served import Bench
from dig_scale.tree import tree_cat, tree_select


@dataclass(frozen=True)
class Pool:
    """Live walkers: labels[i] is row i of `walkers`."""

    labels: tuple[Walker, ...]
    walkers: Walkers


@dataclass(frozen=True)
class Advanced:
    """After a tick: the pool that is left (None when empty), and the finished walkers with their fields of Frames by name,
    float32 arrays [n, ...] (positions in Å, and rotations or cell where the system has them); none where nothing finished.
    """

    pool: Pool | None
    finished: tuple[Walker, ...]
    arrays: Mapping[str, np.ndarray]


def advance_pool(pool: Pool | None, tick: Tick, jobs: Mapping[str, Job], bench: Bench, solver: Solver) -> Advanced:
    """One step of the walkers of `tick`; those it starts are drawn from the prior first."""
    parts = []
    if pool is not None and tick.resumed:
        parts.append(_chosen(pool, tick.resumed))
    if tick.started:
        parts.append(_drawn(tick.started, jobs, bench, solver))
    moved = advance(bench.score_fn, bench.composition, bench.context, solver, tree_cat(parts))
    done = finished(moved).cpu()
    ended = tuple(label for label, over in zip(tick.walkers, done.tolist(), strict=True) if over)
    idle = None if pool is None else without(pool, set(tick.resumed))
    going = without(Pool(tick.walkers, moved), set(ended))
    return Advanced(_joined(idle, going), ended, _finished_arrays(moved, done, bench) if ended else {})


def without(pool: Pool, leaving: Set[Walker]) -> Pool | None:
    """The pool without some of its walkers; None when none is left."""
    if not leaving:
        return pool
    kept = [row for row, label in enumerate(pool.labels) if label not in leaving]
    if not kept:
        return None
    rows = torch.tensor(kept, device=pool.walkers.index.device)
    return Pool(tuple(pool.labels[row] for row in kept), tree_select(pool.walkers, rows))


def _finished_arrays(moved: Walkers, done: torch.Tensor, bench: Bench) -> dict[str, np.ndarray]:
    clean = tree_select(moved.state, done.to(moved.index.device))
    arrays = bench.composition.arrays(clean, bench.context)
    return {name: values.float().cpu().numpy() for name, values in arrays.items()}


def _joined(one: Pool | None, other: Pool | None) -> Pool | None:
    if one is None or other is None:
        return one or other
    return Pool(one.labels + other.labels, tree_cat([one.walkers, other.walkers]))


def _chosen(pool: Pool, labels: tuple[Walker, ...]) -> Walkers:
    if labels == pool.labels:
        return pool.walkers
    place = {label: row for row, label in enumerate(pool.labels)}
    rows = torch.tensor([place[label] for label in labels], device=pool.walkers.index.device)
    return tree_select(pool.walkers, rows)


def _drawn(labels: tuple[Walker, ...], jobs: Mapping[str, Job], bench: Bench, solver: Solver) -> Walkers:
    chosen = [jobs[label.request_id] for label in labels]
    numbers = [
        [job.seed for job in chosen],
        [label.sample for label in labels],
        [job.steps for job in chosen],
    ]
    seed, index, steps = torch.tensor(numbers, dtype=torch.int64, device=bench.context.present.device)
    return walkers_at_start(bench.composition, bench.context, solver, seed, index, steps)
