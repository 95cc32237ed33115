"""Offline sampling on one machine: a number of samples of one system, drawn by several processes, continued when rerun.

In: a checkpoint, a System, the number wanted. Out: a folder with the Ensemble (ensemble.npz, topology.pdb, samples.xtc).
A sample depends on (seed, index) only, so samples already there are kept and only missing indices are drawn. Every block
of indices is a file of its own, written atomically, until all are joined: a killed run loses at most the blocks under way.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from dig_shards.durable import replace_durably

from dig_scale.config import Sample
from dig_scale.ensemble import FILE_NAME, Ensemble, read_ensemble, write_ensemble_file
from dig_scale.errors import UserError
from dig_scale.records import write_topology_pdb, write_xtc
from dig_scale.sampling.integrate import sample
from dig_scale.sampling.solvers import solver_named
from dig_scale.serving.served import Bench, best_device, build_bench, load_served_model, rows_that_fit
from dig_scale.system import System

PARTS = "parts"
TOPOLOGY, TRAJECTORY = "topology.pdb", "samples.xtc"

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
    model = load_served_model(draws.checkpoint, torch.device("cpu"))
    identity = _identity(draws, model.checkpoint_id)
    _claim(draws.out, identity)
    there = _existing(draws.out, draws.settings.num)
    if there is not None and there.n_samples >= draws.settings.num and (draws.out / TRAJECTORY).is_file():
        return there
    have = set() if there is None else set(there.index.tolist())
    missing = np.array([i for i in range(draws.settings.num) if i not in have], np.int64)
    parts = _draw_missing(draws, missing, len(have), progress)
    recipe = model.recipe.model_dump(mode="json")
    provenance = identity | {"recipe": recipe, "training_cost": dict(model.training_cost)}
    ensemble = _joined(draws, there, parts, provenance)
    _publish(ensemble, draws.out)
    for part in parts:
        part.unlink()
    return ensemble


def worker_count(settings: Sample) -> int:
    """Sampling processes: as the recipe says, else one per GPU, else one per core."""
    if settings.workers is not None:
        return settings.workers
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def _identity(draws: Draws, checkpoint_id: str) -> dict[str, Any]:
    settings = draws.settings
    return {
        "checkpoint": checkpoint_id,
        "system_id": draws.system.system_id,
        "solver": settings.solver,
        "steps": settings.steps,
        "seed": settings.seed,
        "network_evaluations_per_sample": settings.steps * solver_named(settings.solver).evaluations_per_step,
    }


def _claim(out: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder whose samples come from other settings; remember these otherwise."""
    out.mkdir(parents=True, exist_ok=True)
    record = out / "run.json"
    if record.is_file():
        there = json.loads(record.read_text())
        changed = [f"{key} {there.get(key)} -> {value}" for key, value in identity.items() if there.get(key) != value]
        if changed:
            raise UserError(f"{out} holds samples of another run ({'; '.join(changed)}): give another --out")
        return
    replace_durably(record, json.dumps(identity, indent=1).encode())


def _existing(out: Path, wanted: int) -> Ensemble | None:
    if not (out / FILE_NAME).is_file():
        return None
    there = read_ensemble(out)
    if there.n_samples > wanted:
        raise UserError(f"{out} holds {there.n_samples} samples, more than the {wanted} asked for: give another --out")
    return there


def _draw_missing(draws: Draws, missing: np.ndarray, have: int, progress: OnSamples | None) -> list[Path]:
    folder = draws.out / PARTS
    folder.mkdir(exist_ok=True)
    blocks = {_part(folder, block): block for block in _blocks(missing, draws)}
    for stray in set(folder.iterdir()) - set(blocks):
        stray.unlink()
    done = have + sum(len(block) for path, block in blocks.items() if path.is_file())
    todo = {path: block for path, block in blocks.items() if not path.is_file()}
    with _pool(draws, len(todo)) as pool:
        running: dict[Future[int], Path] = {pool.submit(_draw_block, path, block): path for path, block in todo.items()}
        try:
            for future in as_completed(running):
                done += future.result()
                if progress is not None:
                    progress(done, draws.settings.num)
        except BrokenProcessPool:
            raise UserError(f"a sampling process died; run the same command again to carry on in {draws.out}") from None
    return list(blocks)


def _blocks(missing: np.ndarray, draws: Draws) -> list[np.ndarray]:
    rows = rows_that_fit(draws.system.n_sites, draws.settings.batch)
    return [missing[start : start + rows] for start in range(0, len(missing), rows)]


def _part(folder: Path, block: np.ndarray) -> Path:
    return folder / f"{block[0]:09d}-{block[-1]:09d}-{len(block)}.npz"


@contextmanager
def _pool(draws: Draws, tasks: int) -> Iterator[ProcessPoolExecutor]:
    workers = max(1, min(worker_count(draws.settings), tasks))
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(draws, threads)
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Bound:
    bench: Bench
    settings: Sample


_bound: list[_Bound] = []
"""What this worker process draws with; filled once by its initializer."""


def _start_worker(draws: Draws, threads: int) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    model = load_served_model(draws.checkpoint, best_device())
    _bound[:] = [_Bound(build_bench(model, draws.system), draws.settings)]


def _end_with_parent() -> None:
    """Leave when the process that started this worker is gone, however it ended."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(3)


def _draw_block(path: Path, block: np.ndarray) -> int:
    """Draw the samples `block` [n] into `path`; the number drawn."""
    bench, settings = _bound[0].bench, _bound[0].settings
    begin = time.process_time()
    index = torch.as_tensor(block, device=bench.context.present.device)
    with torch.inference_mode():
        state = sample(
            bench.score_fn,
            bench.composition,
            bench.context,
            solver_named(settings.solver),
            settings.steps,
            settings.seed,
            index,
        )
    assert state.positions is not None
    spent = time.process_time() - begin
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        np.savez(stream, positions=state.positions.cpu().numpy(), index=block, cpu_seconds=spent)
    temporary.replace(path)
    return len(block)


def _joined(draws: Draws, there: Ensemble | None, parts: list[Path], provenance: dict[str, Any]) -> Ensemble:
    positions = [] if there is None else [there.positions]
    index = [] if there is None else [there.index]
    cpu_seconds = 0.0 if there is None else float(there.provenance.get("cpu_seconds", 0.0))
    for part in parts:
        with np.load(part, allow_pickle=False) as content:
            positions.append(content["positions"])
            index.append(content["index"])
            cpu_seconds += float(content["cpu_seconds"])
    order = np.argsort(np.concatenate(index))
    return Ensemble(
        system=draws.system,
        positions=np.concatenate(positions)[order],
        index=np.concatenate(index)[order],
        seed=draws.settings.seed,
        provenance=provenance | {"cpu_seconds": cpu_seconds},
    )


def _publish(ensemble: Ensemble, out: Path) -> None:
    write_topology_pdb(ensemble.system, ensemble.system.reference_positions, out / TOPOLOGY)
    write_ensemble_file(ensemble, out / FILE_NAME)
    write_xtc(ensemble.system, ensemble.positions, out / TRAJECTORY)


def write_ensemble_folder(ensemble: Ensemble, out: Path) -> Path:
    """The folder of an ensemble that came from elsewhere (a server): topology.pdb, samples.xtc, ensemble.npz."""
    out.mkdir(parents=True, exist_ok=True)
    _publish(ensemble, out)
    return out
