"""Random structure search: sensible random cells relaxed to minima (Pickard and Needs 2011), each new one a Frame.

In: a composition, a calculator factory, and Search. Out: OUT/<formula>/<formula>.zarr, canonical crystals with energies as
the crystal importer makes them, and OUT/<formula>/journal.jsonl, one line on every candidate. Candidate k follows from
(seed, k) alone and candidates are judged in order, so a search that was killed goes on from its last stored chunk and ends
as if it had never been stopped. A candidate that does not relax is recorded and passed over. Knows no calculator.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from dig_shards.durable import replace_durably
from dig_shards.errors import ShardError
from dig_shards.trajectory import TrajectoryReader, TrajectoryWriter

from dig_scale import records
from dig_scale.errors import UserError
from dig_scale.geometry import lattice
from dig_scale.importers.crystal import ENERGY_PER_ATOM, Crystal, canonical, crystal_system, grouped, shape_of
from dig_scale.importers.crystal_duplicates import Distinct, Similarity, entry
from dig_scale.simulation.ase_relaxation import Relaxation, relax_crystal
from dig_scale.simulation.engine import SimulationError
from dig_scale.system import System

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

CANDIDATE = "candidate"
JOURNAL_NAME = "journal.jsonl"
_PLACES_PER_ATOM = 200
_CELLS = 200
_SHAPE_SPREAD = 0.25
"""Standard deviation of the logarithms of a random cell's edges."""

CalculatorFactory = Callable[[], "Calculator"]
"""Makes a calculator with energy, forces and stress; it must be picklable where there are several workers."""


@dataclass(frozen=True)
class Search:
    """What is tried: `candidates` random cells with a volume per atom in [smallest, largest] Å³ and no two sites, images
    included, closer than shortest_distance Å; how they are relaxed; what counts as found before; where it is stored.
    """

    candidates: int
    smallest_volume: float
    largest_volume: float
    shortest_distance: float
    seed: int = 0
    relaxation: Relaxation = field(default_factory=Relaxation)
    similarity: Similarity = field(default_factory=Similarity)
    workers: int = 1
    chunk_frames: int = 8


@dataclass(frozen=True)
class SearchReport:
    """What a search found: counts of candidates by outcome, and the store."""

    store: Path
    kept: int
    repeats: int
    failed: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """One candidate relaxed, or why it was not."""

    candidate: int
    crystal: Crystal | None
    reason: str | None


def search_structures(
    elements: Sequence[int], calculator: CalculatorFactory, method: str, out: Path, search: Search
) -> SearchReport:
    """Run the search for a composition in `out`, or carry it on; `method` names the calculator in the store's origin.

    Raises UserError for limits that no cell fits or a store of another search, SimulationError when a worker died (run
    again to carry on).
    """
    _check(elements, search)
    system = crystal_system(np.sort(np.asarray(elements, np.int64)))
    folder = out / system.name
    store, journal = folder / f"{system.name}.zarr", folder / JOURNAL_NAME
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _writer(store, system, _origin(method, search), search) as writer:
            if not writer.is_finished:
                _Run(system, search, writer, store, journal).carry_on(calculator)
    except ShardError as error:
        raise UserError(str(error)) from error
    return _report(store, journal)


def random_crystal(elements: np.ndarray, search: Search, candidate: int) -> Crystal:
    """Candidate number `candidate` of a search; raises UserError when no arrangement fits the limits."""
    rng = np.random.default_rng([search.seed, candidate])
    for _ in range(_CELLS):
        cell = _random_cell(len(elements), search, rng)
        positions = _random_places(len(elements), cell, search.shortest_distance, rng)
        if positions is not None:
            return Crystal(elements, positions, cell, {}, None, f"candidate {candidate}")
    raise UserError(
        f"no cell of {search.smallest_volume:g}-{search.largest_volume:g} Å³ per atom took {len(elements)} atoms "
        f"{search.shortest_distance:g} Å apart in {_CELLS} trials; allow more volume or shorter distances"
    )


def _random_cell(n: int, search: Search, rng: np.random.Generator) -> np.ndarray:
    volume = n * rng.uniform(search.smallest_volume, search.largest_volume)
    shape = np.concatenate([[np.log(volume) / np.sqrt(3)], _SHAPE_SPREAD * rng.normal(size=5)])
    return np.asarray(lattice.cell_from_log(torch.from_numpy(shape)).numpy())


def _random_places(n: int, cell: np.ndarray, limit: float, rng: np.random.Generator) -> np.ndarray | None:
    """Places [n, 3] Å at least `limit` apart, one after the other; None when one more does not fit."""
    shifts = lattice.image_shifts(torch.from_numpy(cell), limit).numpy()
    images = shifts @ cell
    if (np.linalg.norm(images[shifts.any(axis=1)], axis=1) < limit).any():
        return None
    places = np.zeros((0, 3))
    for _ in range(n):
        trials = rng.random((_PLACES_PER_ATOM, 3)) @ cell
        taken = (places[:, None] + images).reshape(-1, 3)
        distances = np.linalg.norm(trials[:, None] - taken, axis=-1).min(axis=1, initial=np.inf)
        free = np.flatnonzero(distances >= limit)
        if not len(free):
            return None
        places = np.concatenate([places, trials[free[:1]]])
    return places


@dataclass
class _Run:
    """One driver of one search: hands out candidates, judges them in order, stores what is new."""

    system: System
    search: Search
    writer: TrajectoryWriter
    store: Path
    journal: Path

    def carry_on(self, calculator: CalculatorFactory) -> None:
        """From the candidate after the last stored one to the end."""
        distinct = Distinct(self.search.similarity)
        first = self._recall(distinct)
        lines = _kept_lines(self.journal, first)
        pending: list[Crystal] = []
        for outcome in _outcomes(self.system.elements, calculator, self.search, first):
            lines.append(_judged(outcome, distinct))
            if outcome.crystal is not None and lines[-1]["repeats"] is None:
                pending.append(outcome.crystal)
            if len(pending) == self.search.chunk_frames:
                self._write_journal(lines)
                self.writer.append_chunk(_arrays(pending))
                pending = []
        self._write_journal(lines)
        self.writer.finish(_arrays(pending) if pending else None)

    def _recall(self, distinct: Distinct) -> int:
        """Fill `distinct` with the stored structures; returns the first candidate that they do not cover."""
        if self.writer.n_frames == 0:
            return 0
        frames = records.read_trajectory_frames(self.store)[1]
        assert frames.cell is not None and frames.energy is not None
        for positions, cell, energy in zip(frames.positions, frames.cell, frames.energy, strict=True):
            stored = Crystal(self.system.elements, positions.astype(float), cell, {}, float(energy), "")
            distinct.add(entry(shape_of(stored)))
        return int(frames.labels[CANDIDATE][-1]) + 1

    def _write_journal(self, lines: Sequence[dict[str, Any]]) -> None:
        replace_durably(self.journal, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _judged(outcome: Outcome, distinct: Distinct) -> dict[str, Any]:
    """The journal's line on a candidate; a structure not seen before joins `distinct`."""
    if outcome.crystal is None:
        return {CANDIDATE: outcome.candidate, "failed": outcome.reason}
    new = entry(shape_of(outcome.crystal))
    known = distinct.find(new)
    if known is None:
        distinct.add(new)
    return {CANDIDATE: outcome.candidate, "energy": outcome.crystal.energy, "repeats": known}


def _kept_lines(journal: Path, first: int) -> list[dict[str, Any]]:
    return [line for line in _lines(journal) if line[CANDIDATE] < first]


def _lines(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.is_file() else []


def _arrays(crystals: Sequence[Crystal]) -> dict[str, np.ndarray]:
    ((_, frames),) = grouped(crystals)
    return records.frame_arrays(frames)


def _outcomes(elements: np.ndarray, calculator: CalculatorFactory, search: Search, first: int) -> Iterator[Outcome]:
    """Outcomes of candidates first, first + 1, ... in that order."""
    size = search.chunk_frames
    batches = [range(k, min(k + size, search.candidates)) for k in range(first, search.candidates, size)]
    job = partial(_relax_batch, elements, calculator, search)
    if search.workers <= 1:
        for batch in batches:
            yield from job(batch)
        return
    # a fresh interpreter for each: the caller may hold threads, which a fork would cut off
    with ProcessPoolExecutor(search.workers, get_context("spawn"), _end_with_parent) as pool:
        try:
            for outcomes in pool.map(job, batches):
                yield from outcomes
        except BrokenProcessPool as error:
            raise SimulationError("a worker of the structure search died; run it again to carry on") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let a worker end when its parent does, even by SIGKILL."""
    parent = parent_process()
    if parent is not None:
        Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _relax_batch(
    elements: np.ndarray, calculator: CalculatorFactory, search: Search, candidates: Sequence[int]
) -> list[Outcome]:
    torch.set_num_threads(1)
    method = calculator()
    return [_relaxed(elements, method, search, candidate) for candidate in candidates]


def _relaxed(elements: np.ndarray, calculator: Calculator, search: Search, candidate: int) -> Outcome:
    start = random_crystal(elements, search, candidate)
    try:
        found = relax_crystal(elements, start.positions, start.cell, calculator, search.relaxation)
        labels = {CANDIDATE: float(candidate), ENERGY_PER_ATOM: found.energy / len(elements)}
        return Outcome(
            candidate,
            canonical(Crystal(elements, found.positions, found.cell, labels, found.energy, start.source)),
            None,
        )
    except UserError as error:
        return Outcome(candidate, None, str(error))


def _check(elements: Sequence[int], search: Search) -> None:
    if not len(elements) or min(elements) < 1:
        raise UserError(f"elements {list(elements)}: expected the atomic numbers of at least one atom")
    if search.candidates < 1 or search.chunk_frames < 1:
        raise UserError(
            f"{search.candidates} candidates in chunks of {search.chunk_frames}: expected 1 or more of both"
        )
    if not 0 < search.smallest_volume <= search.largest_volume:
        raise UserError(
            f"volume per atom {search.smallest_volume:g}-{search.largest_volume:g} Å³: expected 0 < smallest <= largest"
        )


def _origin(method: str, search: Search) -> dict[str, Any]:
    settings = asdict(search)
    settings.pop("workers")
    more = {"first_frame_ps": 0.0, "frame_spacing_ps": 1.0}
    return {"engine": "structure search", "method": method, "search": settings} | more


def _writer(store: Path, system: System, origin: dict[str, Any], search: Search) -> TrajectoryWriter:
    attributes = json.loads(json.dumps(records.trajectory_attributes(system, origin)))
    if not store.is_dir():
        labels = [records.LABEL + name for name in sorted((CANDIDATE, ENERGY_PER_ATOM))]
        specs = records.field_specs(system.n_sites, [records.POSITIONS, records.ENERGY, records.CELL, *labels])
        return TrajectoryWriter.create(store, specs, attributes, search.chunk_frames)
    if TrajectoryReader(store).attributes != attributes:
        raise UserError(f"{store} holds another search (other settings or method); choose another folder, or remove it")
    return TrajectoryWriter.resume(store)


def _report(store: Path, journal: Path) -> SearchReport:
    lines = _lines(journal)
    failed = tuple(f"candidate {line[CANDIDATE]}: {line['failed']}" for line in lines if line.get("failed"))
    repeats = sum(line.get("repeats") is not None for line in lines)
    return SearchReport(store, TrajectoryReader(store).n_frames, repeats, failed)
