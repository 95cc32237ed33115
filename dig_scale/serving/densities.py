"""Log-densities of structures under a trained model, by several processes, continued when rerun.

In: a checkpoint, structures of one System, how to integrate. Out: log p of every structure and its error, of probes and
quadrature, NaN where it has none (a broken structure is no reason to give up the others). Every batch is a file of its own,
whole or absent, so a killed run loses at most the batches under way. Knows no energies and no command line.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dig_scale.errors import UserError
from dig_scale.run_record import claim
from dig_scale.sampling.likelihood import Hutchinson, LikelihoodSettings, log_density
from dig_scale.serving.processes import process_count, processes
from dig_scale.serving.served import ANYTHING, Bench, Wanted, best_device, build_bench, load_served_model, rows_that_fit
from dig_scale.system import System

PARTS = "parts"

OnStructures = Callable[[int, int], None]
"""(structures done, structures wanted)."""
_Batch = tuple[Path, int, dict[str, np.ndarray]]
"""File, number of the first structure, arrays."""


@dataclass(frozen=True)
class Structures:
    """Structures of one system: positions [S, N, 3] Å, rotations [S, N, 3, 3], cell [S, 3, 3] Å."""

    system: System
    positions: np.ndarray
    rotations: np.ndarray | None = None
    cell: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The fields that are there, float32."""
        given = {"positions": self.positions, "rotations": self.rotations, "cell": self.cell}
        return {name: np.asarray(values, np.float32) for name, values in given.items() if values is not None}


@dataclass(frozen=True)
class DensityRun:
    """What fixes every log-density, and how it is computed; `wanted` are the properties that the model is asked for."""

    checkpoint: Path
    checkpoint_id: str
    structures: Structures
    settings: LikelihoodSettings = field(default_factory=LikelihoodSettings)
    wanted: Wanted = ANYTHING
    batch: int = 64
    workers: int | None = None


@dataclass(frozen=True)
class Densities:
    """log_density [S] nat; its standard_error [S], of the probes together with the last change of the quadrature; score-function
    calls and CPU seconds in all."""

    log_density: np.ndarray
    standard_error: np.ndarray
    evaluations: int
    cpu_seconds: float


def log_densities(run: DensityRun, out: Path, progress: OnStructures | None = None) -> Densities:
    """Log-densities of all structures; batches that an earlier run left in out/parts are kept.

    Raises UserError when `out` is of another run, when a process died (run again), or when not one structure has a density.
    """
    claim(out, identity_of(run))
    folder = out / PARTS
    folder.mkdir(exist_ok=True)
    count = len(run.structures.positions)
    rows = rows_that_fit(run.structures.system.n_sites, run.batch)
    blocks = {_part(folder, first, min(first + rows, count)): first for first in range(0, count, rows)}
    for stray in set(folder.iterdir()) - set(blocks):
        stray.unlink()
    _compute_missing(run, blocks, rows, progress)
    return _joined(list(blocks))


def discard_parts(out: Path) -> None:
    """Remove the files of batches, once what they hold is elsewhere."""
    for part in (out / PARTS).glob("*.npz"):
        part.unlink()


def identity_of(run: DensityRun) -> dict[str, Any]:
    """What log-densities depend on, JSON-ready; batches and processes are not among it."""
    digest = hashlib.sha256()
    for name, values in run.structures.arrays.items():
        digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
    divergence = {key: value for key, value in asdict(run.settings.divergence).items() if key != "chunk"}
    return {
        "checkpoint": run.checkpoint_id,
        "system_id": run.structures.system.system_id,
        "structures": digest.hexdigest()[:16],
        "integration": asdict(run.settings.integration),
        "tolerance": run.settings.tolerance,
        "divergence": {"kind": type(run.settings.divergence).__name__.lower()} | divergence,
        "conditions": dict(run.wanted.listed),
        "guidance": run.wanted.guidance,
    }


def _compute_missing(run: DensityRun, blocks: dict[Path, int], rows: int, progress: OnStructures | None) -> None:
    count = len(run.structures.positions)
    todo = [path for path in blocks if not path.is_file()]
    done = count - sum(min(rows, count - blocks[path]) for path in todo)
    if not todo:
        return
    # structures travel with their batches, not with the start of every process
    bare = replace(run, structures=Structures(run.structures.system, run.structures.positions[:0]))
    batches = [(path, blocks[path], _rows_of(run.structures, blocks[path], rows)) for path in todo]
    workers = max(1, min(process_count(run.workers), len(todo)))
    for number in _here(bare, batches) if workers == 1 else _in_processes(bare, batches, workers):
        done += number
        if progress is not None:
            progress(done, count)


def _here(bare: DensityRun, batches: Sequence[_Batch]) -> Iterator[int]:
    """Structures of every batch, as they are done, in this process."""
    bound = _prepared(bare)
    for batch in batches:
        yield _compute(bound, *batch)


def _in_processes(bare: DensityRun, batches: Sequence[_Batch], workers: int) -> Iterator[int]:
    with processes(workers, _begin, bare) as pool:
        try:
            for future in as_completed([pool.submit(_compute_there, *batch) for batch in batches]):
                yield future.result()
        except BrokenProcessPool:
            raise UserError("a process died; run the same command again to carry on") from None


def _rows_of(structures: Structures, first: int, rows: int) -> dict[str, np.ndarray]:
    return {name: values[first : first + rows] for name, values in structures.arrays.items()}


def _part(folder: Path, first: int, end: int) -> Path:
    return folder / f"{first:09d}-{end - 1:09d}.npz"


@dataclass(frozen=True)
class _Bound:
    bench: Bench
    settings: LikelihoodSettings


_bound: list[_Bound] = []
"""What this worker process computes with; filled once when it begins."""


def _begin(bare: DensityRun) -> None:
    _bound[:] = [_prepared(bare)]


def _prepared(bare: DensityRun) -> _Bound:
    model = load_served_model(bare.checkpoint, best_device())
    return _Bound(build_bench(model, bare.structures.system, bare.wanted), bare.settings)


def _compute_there(path: Path, first: int, arrays: dict[str, np.ndarray]) -> int:
    return _compute(_bound[0], path, first, arrays)


def _compute(bound: _Bound, path: Path, first: int, arrays: dict[str, np.ndarray]) -> int:
    """Log-densities of one batch into `path`; the number of structures."""
    bench, settings = bound.bench, bound.settings
    if isinstance(settings.divergence, Hutchinson):
        # probes are a function of the row within a batch
        settings = replace(settings, divergence=replace(settings.divergence, seed=settings.divergence.seed + first))
    begin = time.process_time()
    value, error, calls, problem = _values(bench, settings, arrays)
    spent = time.process_time() - begin
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        told = np.frombuffer(problem.encode(), np.uint8)
        np.savez(stream, value=value, error=error, evaluations=calls, cpu_seconds=spent, problem=told)
    temporary.replace(path)
    return len(value)


def _values(
    bench: Bench, settings: LikelihoodSettings, arrays: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, int, str]:
    """log p [n], errors [n], calls and what was wrong; where a batch fails its halves are tried, down to single structures."""
    count = len(arrays["positions"])
    device = bench.context.present.device
    try:
        _require_finite(arrays)
        given = {name: torch.as_tensor(values).to(device) for name, values in arrays.items()}
        state = bench.composition.state(given, bench.context)
        found = log_density(bench.score_fn, bench.composition, state, bench.context, settings)
    except (UserError, AssertionError) as error:
        # torchdiffeq asserts where adaptive steps become too small
        if count == 1:
            return np.full(1, np.nan), np.full(1, np.nan), 0, " ".join(str(error).split())
        middle = count // 2
        parts = [slice(0, middle), slice(middle, count)]
        halves = [_values(bench, settings, {name: x[part] for name, x in arrays.items()}) for part in parts]
        (a, ea, na, pa), (b, eb, nb, pb) = halves
        return np.concatenate([a, b]), np.concatenate([ea, eb]), na + nb, pa or pb
    uncertain = torch.hypot(found.standard_error, found.last_change)
    return found.log_density.cpu().numpy(), uncertain.cpu().numpy(), found.evaluations, ""


def _require_finite(arrays: dict[str, np.ndarray]) -> None:
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise UserError(f"a structure has {name} that are not finite")


def _joined(parts: Sequence[Path]) -> Densities:
    read = []
    for path in parts:
        with np.load(path, allow_pickle=False) as content:
            read.append(dict(content))
    value = np.concatenate([one["value"] for one in read])
    if not np.isfinite(value).any():
        reasons = [one["problem"].tobytes().decode() for one in read]
        raise UserError(
            f"not one of {len(value)} structures has a log-density; the first: {next(filter(None, reasons))}"
        )
    return Densities(
        log_density=value,
        standard_error=np.concatenate([one["error"] for one in read]),
        evaluations=sum(int(one["evaluations"]) for one in read),
        cpu_seconds=sum(float(one["cpu_seconds"]) for one in read),
    )
