"""Offline sampling on one machine: samples of one or several systems, drawn by several processes, continued when rerun.

In: a checkpoint, Systems, the numbers wanted. Out: a folder for each with its Ensemble (outputs.ensembles says in which files).
A sample depends on (seed, index) only, so samples already there are kept and only missing indices are drawn. Every block
of indices is a file of its own, written atomically, until all are joined: a killed run loses at most the blocks under way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dig_scale.config import Sample
from dig_scale.config_properties import PREDICTOR
from dig_scale.diffusion.composition import composition_for
from dig_scale.ensemble import FILE_NAME, STEERED, Ensemble, read_ensemble
from dig_scale.errors import UserError
from dig_scale.model.features import require_features
from dig_scale.outputs.ensembles import is_complete, write_ensemble_folder
from dig_scale.run_record import claim
from dig_scale.sampling.solvers import solver_named
from dig_scale.serving.block import POPULATION, draw_block, draw_blocks, require_properties
from dig_scale.serving.predictors import ServedPredictor, guide_with, load_predictor
from dig_scale.serving.processes import process_count, processes
from dig_scale.serving.served import (
    Benches,
    ServedModel,
    best_device,
    load_served_model,
    require_wanted,
    rows_that_fit,
    wanted_by,
)
from dig_scale.system import System

PARTS = "parts"
_ARRAYS = ("positions", "rotations", "cell", "log_weights", "bias")

OnSamples = Callable[[int, int], None]
"""(samples there, samples wanted)."""


@dataclass(frozen=True)
class Draws:
    """What fixes every sample of a run, and where it goes."""

    checkpoint: Path
    system: System
    settings: Sample
    out: Path


def sample_ensemble(draws: Draws, progress: OnSamples | None = None) -> Ensemble:
    """The ensemble of draws.settings.num samples in draws.out: what is there is kept, the rest is drawn.

    Raises UserError when the folder holds samples of another run, or a process died (run again to carry on).
    """
    return sample_ensembles([draws], progress)[0]


def sample_ensembles(wanted: Sequence[Draws], progress: OnSamples | None = None) -> list[Ensemble]:
    """The ensembles of several systems by one checkpoint and settings that differ in `num` alone; raises as sample_ensemble."""
    first = wanted[0]
    model = load_served_model(first.checkpoint, torch.device("cpu"))
    predictor = load_predictor(first.settings.guide, torch.device("cpu"))
    require_wanted(model.recipe, wanted_by(first.settings))
    for draws in wanted:
        _require_fit(predictor, draws, model)
        require_features(draws.system, model.recipe.model)
        require_properties(draws.settings, draws.system)
        _require_whole_populations(draws)
    plans = [_plan(draws, model, predictor) for draws in wanted]
    _draw_missing(plans, progress)
    return [_finished(plan, model) for plan in plans]


@dataclass(frozen=True)
class _Plan:
    """One system's part of a run: what is there, and the blocks of indices that are not, by their files."""

    draws: Draws
    identity: dict[str, Any]
    there: Ensemble | None
    blocks: dict[Path, np.ndarray]

    @property
    def have(self) -> int:
        return 0 if self.there is None else self.there.n_samples


def _require_fit(predictor: ServedPredictor | None, draws: Draws, model: ServedModel) -> None:
    if predictor is not None and draws.settings.guide is not None:
        composition = composition_for(draws.system.kind, model.recipe.diffusion)
        guide_with(predictor, draws.settings.guide, draws.system, composition)


def _plan(draws: Draws, model: ServedModel, predictor: ServedPredictor | None) -> _Plan:
    identity = _identity(draws, model.checkpoint_id, predictor)
    claim(draws.out, identity)
    there = _existing(draws.out, draws.settings.num)
    have = set() if there is None else set(there.index.tolist())
    missing = np.array([i for i in range(draws.settings.num) if i not in have], np.int64)
    folder = draws.out / PARTS
    folder.mkdir(exist_ok=True)
    blocks = {_part(folder, block): block for block in _blocks(missing, draws)}
    for stray in set(folder.iterdir()) - set(blocks):
        stray.unlink()
    return _Plan(draws, identity, there, blocks)


def _finished(plan: _Plan, model: ServedModel) -> Ensemble:
    """The whole ensemble, on disk."""
    if plan.there is not None and not plan.blocks and is_complete(plan.there, plan.draws.out):
        return plan.there
    recipe = model.recipe.model_dump(mode="json")
    provenance = plan.identity | {"recipe": recipe, "training_cost": dict(model.training_cost)}
    ensemble = _joined(plan, provenance)
    write_ensemble_folder(ensemble, plan.draws.out)
    for part in plan.blocks:
        part.unlink()
    return ensemble


def _identity(draws: Draws, checkpoint_id: str, predictor: ServedPredictor | None) -> dict[str, Any]:
    settings, wanted = draws.settings, wanted_by(draws.settings)
    evaluations = solver_named(settings.solver).evaluations_per_step * wanted.evaluations
    identity: dict[str, Any] = {
        "checkpoint": checkpoint_id,
        "system_id": draws.system.system_id,
        "solver": settings.solver,
        "steps": settings.steps,
        "seed": settings.seed,
        "network_evaluations_per_sample": settings.steps * evaluations,
    }
    if wanted.conditions:
        identity |= {"conditions": dict(sorted(wanted.conditions.items())), "guidance": wanted.guidance}
    if settings.guide is not None:
        identity["guide"] = settings.guide.model_dump(mode="json")
    if predictor is not None:  # by what it is, wherever it lies
        guide = settings.guide.model_dump(mode="json") if settings.guide else {}
        identity["guide"] = guide | {"property": PREDICTOR + predictor.predicts.property}
        identity["predictor"] = {"checkpoint": predictor.checkpoint_id, "recipe": predictor.recipe.name}
    if settings.steer is not None:
        identity |= {"steer": settings.steer.model_dump(mode="json"), "population": _rows(draws)}
    return identity


def _existing(out: Path, wanted: int) -> Ensemble | None:
    if not (out / FILE_NAME).is_file():
        return None
    there = read_ensemble(out)
    if there.n_samples > wanted:
        raise UserError(f"{out} holds {there.n_samples} samples, more than the {wanted} asked for: give another --out")
    return there


def _draw_missing(plans: Sequence[_Plan], progress: OnSamples | None) -> None:
    """Draw every block that has no file yet, all systems' in one pool."""
    total = sum(plan.draws.settings.num for plan in plans)
    done = sum(plan.have for plan in plans)
    done += sum(len(block) for plan in plans for path, block in plan.blocks.items() if path.is_file())
    todo = [(plan, path) for plan in plans for path in plan.blocks if not path.is_file()]
    if not todo:
        return
    draws = plans[0].draws
    loads = _loads(todo)
    count = max(1, min(process_count(draws.settings.workers), len(loads)))
    with processes(count, _start_worker, draws) as pool:
        running: list[Future[int]] = [pool.submit(_draw_load, load) for load in loads]
        try:
            for future in as_completed(running):
                done += future.result()
                if progress is not None:
                    progress(done, total)
        except BrokenProcessPool:
            raise UserError(f"a sampling process died; run the same command again to carry on in {draws.out}") from None


@dataclass(frozen=True)
class _Block:
    """Samples `index` [n] of a system, and their file."""

    path: Path
    index: np.ndarray
    system: System


def _loads(todo: Sequence[tuple[_Plan, Path]]) -> list[list[_Block]]:
    """Blocks that are drawn in one batch each: small ones of systems of one kind and size go together."""
    loads: list[list[_Block]] = []
    open_loads: dict[Any, list[_Block]] = {}
    for plan, path in todo:
        system, settings = plan.draws.system, plan.draws.settings
        block = _Block(path, plan.blocks[path], system)
        if settings.guide is not None or settings.steer is not None:
            loads.append([block])
            continue
        alike = (system.kind, system.n_sites, system.periodic)
        load = open_loads.get(alike)
        if load is None or sum(len(one.index) for one in load) + len(block.index) > _rows(plan.draws):
            load = open_loads[alike] = []
            loads.append(load)
        load.append(block)
    return loads


def _blocks(missing: np.ndarray, draws: Draws) -> list[np.ndarray]:
    rows = _rows(draws)
    return [missing[start : start + rows] for start in range(0, len(missing), rows)]


def _rows(draws: Draws) -> int:
    """Samples of one block; a steered population is one."""
    rows = rows_that_fit(draws.system.n_sites, draws.settings.batch)
    return rows if draws.settings.steer is None else min(rows, draws.settings.num)


def _require_whole_populations(draws: Draws) -> None:
    """Part of a steered population is no sample of what all of it stands for."""
    rows, num = _rows(draws), draws.settings.num
    if draws.settings.steer is not None and num % rows:
        raise UserError(
            f"{num} steered samples of {draws.system.name!r} are no whole number of populations of {rows}: ask for "
            f"{num + rows - num % rows}, or set --batch to the size of a population"
        )


def _part(folder: Path, block: np.ndarray) -> Path:
    return folder / f"{block[0]:09d}-{block[-1]:09d}-{len(block)}.npz"


@dataclass(frozen=True)
class _Bound:
    benches: Benches
    settings: Sample
    predictor: ServedPredictor | None


_bound: list[_Bound] = []
"""What this worker process draws with; filled once by its initializer."""


def _start_worker(draws: Draws) -> None:
    device = best_device()
    model, predictor = load_served_model(draws.checkpoint, device), load_predictor(draws.settings.guide, device)
    _bound[:] = [_Bound(Benches(model, wanted_by(draws.settings)), draws.settings, predictor)]


def _draw_load(load: Sequence[_Block]) -> int:
    """Draw the blocks of one batch, each into its file; the number of samples."""
    bound = _bound[0]
    benches = [bound.benches.bench(block.system) for block in load]
    begin = time.process_time()
    if len(load) == 1:
        drawn = [draw_block(benches[0], bound.settings, load[0].index, bound.predictor)]
    else:
        drawn = draw_blocks(benches, bound.settings, [block.index for block in load])
    spent = time.process_time() - begin
    count = sum(len(block.index) for block in load)
    for block, found in zip(load, drawn, strict=True):
        temporary = block.path.with_suffix(".tmp")
        with temporary.open("wb") as stream:
            share = spent * len(block.index) / count
            np.savez(stream, allow_pickle=False, index=block.index, cpu_seconds=share, **found)
        temporary.replace(block.path)
    return count


def _joined(plan: _Plan, provenance: dict[str, Any]) -> Ensemble:
    there, draws = plan.there, plan.draws
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in _ARRAYS}
    if there is not None:
        for name in _ARRAYS:
            arrays[name] += [] if getattr(there, name) is None else [getattr(there, name)]
    index = [] if there is None else [there.index]
    cpu_seconds = 0.0 if there is None else float(there.provenance.get("cpu_seconds", 0.0))
    populations = [] if there is None else list(there.provenance.get("populations", []))
    for part in plan.blocks:
        with np.load(part, allow_pickle=False) as content:
            for name in set(_ARRAYS) & set(content.files):
                arrays[name].append(content[name])
            index.append(content["index"])
            cpu_seconds += float(content["cpu_seconds"])
            if "bias" in content.files:
                populations.append({"first": int(index[-1][0])} | {name: content[name].tolist() for name in POPULATION})
    steered = {"log_weights": STEERED, "populations": populations} if populations else {}
    order = np.argsort(np.concatenate(index))
    return Ensemble(
        system=draws.system,
        **{name: np.concatenate(values)[order] for name, values in arrays.items() if values},
        index=np.concatenate(index)[order],
        seed=draws.settings.seed,
        provenance=provenance | steered | {"cpu_seconds": cpu_seconds},
    )
