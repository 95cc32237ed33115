"""Packed dataset -> the inputs of a training step: a pure function of (recipe, seed, step, cursor), and a thread that runs ahead.

In: a dig_shards dataset whose sidecars are systems. Out: StepInputs, with positions, noise levels and noise of this rank's
rows. Everything random is drawn from a generator seeded by (seed, purpose, step, block of rows), so a run resumes without
any generator state, and a row gets the same noise whatever the number of ranks. Knows neither the network nor DeepSpeed.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from dig_shards import Cursor, ShardError, ShardReader, batch_ids, load_manifest, system_batch
from torch import Tensor

from dig_scale.batch import Batch, Context, State
from dig_scale.config import Recipe, Train
from dig_scale.diffusion.composition import Composition, composition_for
from dig_scale.errors import TrainingError
from dig_scale.model.features import featurise
from dig_scale.objectives.denoising import draw_times
from dig_scale.records import POSITIONS
from dig_scale.system import System
from dig_scale.training.zero import Ranks, Share, share_of
from dig_scale.tree import tree_to

NOISE_BLOCK = 64
"""Rows that share a generator: a part of the format of a resumable run."""
_AHEAD = 2
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: clean batch, t [B], standard normal noise of the state's shape, and the processes of its kind."""

    batch: Batch
    t: Tensor
    noise: State
    composition: Composition

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on `device`; its context is expected there already."""
        batch = Batch(tree_to(self.batch.state, device), self.batch.context, self.batch.systems)
        return MicroBatch(batch, self.t.to(device), tree_to(self.noise, device), self.composition)


@dataclass(frozen=True)
class ValidationBatch:
    """A forward pass of a validation; `weight` is 0 where it only keeps this rank in step with the others."""

    micro: MicroBatch
    weight: float


@dataclass(frozen=True)
class StepInput:
    """What this rank needs for one optimizer step, and where the data stands after it."""

    frame_ids: np.ndarray
    micro_batches: tuple[MicroBatch, ...]
    next_cursor: Cursor


@dataclass(frozen=True)
class TrainingData:
    """One split of a dataset with the static features of its systems on the training device."""

    reader: ShardReader
    systems: tuple[System, ...]
    contexts: tuple[Context, ...]
    compositions: tuple[Composition, ...]

    def micro_batch(self, system: int, ids: np.ndarray, t: Tensor, noise: State) -> MicroBatch:
        """Read frames of one system."""
        positions = torch.from_numpy(self.reader.read_batch(ids, POSITIONS))
        batch = Batch(State(positions=positions), self.contexts[system], (self.systems[system].name,))
        return MicroBatch(batch, t, noise, self.compositions[system])


def open_split(dataset: Path, split: str, recipe: Recipe, device: torch.device) -> TrainingData | None:
    """One split of a dataset, or None where it has no frames; raises TrainingError naming a system that does not fit."""
    try:
        if not load_manifest(dataset).frames(split):
            return None
        reader = ShardReader(dataset, split)
        systems = tuple(System.from_json(reader.sidecar(number)) for number in range(len(reader.systems)))
    except ShardError as error:
        raise TrainingError(str(error)) from error
    for system, entry in zip(systems, reader.systems, strict=True):
        stored = entry.spec(POSITIONS).shape
        if stored != (system.n_sites, 3):
            raise TrainingError(
                f"{dataset}: positions of system {system.name!r} are stored as {stored}, expected ({system.n_sites}, 3)"
            )
    contexts = tuple(featurise(system).to(device) for system in systems)
    compositions = tuple(composition_for(system.kind, recipe.diffusion) for system in systems)
    return TrainingData(reader, systems, contexts, compositions)


def step_input(data: TrainingData, train: Train, ranks: Ranks, step: int, cursor: Cursor) -> StepInput:
    """The rows of this rank in step `step` (0-based); all rows of a global batch are of one system."""
    share = share_of(train, ranks.world_size)
    system, ids, next_cursor = _draw_ids(data.reader, cursor, train.global_batch, ranks)
    first = ranks.rank * share.rows
    times = draw_times(train.global_batch, train.time_sampling, counter_generator(train.seed, "times", step))
    noise = noise_rows(data, system, train.seed, f"noise {step}", range(first, first + share.rows))
    micro_batches = tuple(_micro_batches(data, system, ids, times[first : first + share.rows], noise, share))
    return StepInput(ids, micro_batches, next_cursor)


def validation_batches(data: TrainingData, train: Train, ranks: Ranks, rows: int) -> Iterator[ValidationBatch]:
    """This rank's part of about `rows` evenly spaced frames with noise that is the same at every validation.

    All ranks get the same number of batches, as ZeRO-3 needs; those that fill up count for nothing.
    """
    parts = _validation_parts(data, rows, share_of(train, ranks.world_size).micro_batch)
    filled = -(-len(parts) // ranks.world_size) * ranks.world_size
    for number in range(ranks.rank, filled, ranks.world_size):
        system, low, high = parts[number % len(parts)]
        start, stop = (int(end) for end in data.reader.offsets[system : system + 2])
        ids = np.linspace(start, stop - 1, _validation_rows(data, system, rows)).astype(np.int64)[low:high]
        times = ((0.5 + _GOLDEN * torch.arange(low, high, dtype=torch.float64)) % 1.0).float()
        noise = noise_rows(data, system, train.seed, f"validation {system}", range(low, high))
        yield ValidationBatch(data.micro_batch(system, ids, times, noise), float(number < len(parts)))


def counter_generator(seed: int, purpose: str, counter: int) -> torch.Generator:
    """A generator that depends on its three arguments only."""
    digest = hashlib.blake2b(f"dig-training/{seed}/{purpose}/{counter}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def noise_rows(data: TrainingData, system: int, seed: int, purpose: str, rows: range) -> State:
    """Standard normal noise of the given rows of a global batch, drawn by blocks of NOISE_BLOCK rows."""
    blocks = range(rows.start // NOISE_BLOCK, -(-rows.stop // NOISE_BLOCK))
    context = tree_to(data.contexts[system], "cpu")
    like = State(positions=torch.empty(NOISE_BLOCK, context.n_sites, 3))
    normal = data.compositions[system].standard_normal
    drawn = [normal(like, context, counter_generator(seed, purpose, block)).positions for block in blocks]
    offset = rows.start - blocks.start * NOISE_BLOCK
    return State(positions=torch.cat([part for part in drawn if part is not None])[offset : offset + len(rows)])


class Prefetcher:
    """Step inputs in order, made by a thread that runs a few steps ahead; `waited` is the seconds of the last wait."""

    def __init__(self, data: TrainingData, train: Train, ranks: Ranks, start: int, cursor: Cursor) -> None:
        self.waited = 0.0
        self._queue: queue.Queue[StepInput | BaseException] = queue.Queue(maxsize=_AHEAD)
        self._stop = threading.Event()
        arguments = (data, train, ranks, start, cursor)
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True, name="prefetch")
        self._thread.start()

    def next(self) -> StepInput:
        """The next step's input; raises what the reading thread raised."""
        start = time.perf_counter()
        item = self._queue.get()
        self.waited = time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _run(self, data: TrainingData, train: Train, ranks: Ranks, start: int, cursor: Cursor) -> None:
        try:
            for step in range(start, train.steps):
                if self._stop.is_set():
                    return
                item = step_input(data, train, ranks, step, cursor)
                cursor = item.next_cursor
                self._queue.put(item)
        except Exception as error:  # handed to the thread that waits for it
            self._queue.put(error)


def _validation_rows(data: TrainingData, system: int, rows: int) -> int:
    start, stop = data.reader.offsets[system : system + 2]
    return min(int(stop - start), max(1, rows // len(data.systems)))


def _validation_parts(data: TrainingData, rows: int, size: int) -> list[tuple[int, int, int]]:
    """(system, first row, last row + 1) of every batch of a validation."""
    counts = [_validation_rows(data, system, rows) for system in range(len(data.systems))]
    return [(s, low, min(low + size, n)) for s, n in enumerate(counts) for low in range(0, n, size)]


def _draw_ids(reader: ShardReader, cursor: Cursor, size: int, ranks: Ranks) -> tuple[int, np.ndarray, Cursor]:
    if len(reader.systems) == 1:
        ids, next_cursor = batch_ids(cursor, reader.n_frames, size, ranks.rank, ranks.world_size)
        return 0, ids, next_cursor
    drawn = system_batch(cursor, reader.offsets, size, ranks.rank, ranks.world_size)
    return drawn.system, drawn.frame_ids, drawn.next_cursor


def _micro_batches(
    data: TrainingData, system: int, ids: np.ndarray, t: Tensor, noise: State, share: Share
) -> Iterator[MicroBatch]:
    assert noise.positions is not None
    for low in range(0, share.rows, share.micro_batch):
        part = slice(low, low + share.micro_batch)
        yield data.micro_batch(system, ids[part], t[part], State(positions=noise.positions[part]))
