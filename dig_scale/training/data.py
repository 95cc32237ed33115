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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from dig_shards import Cursor, ShardError, ShardReader, batch_ids, load_manifest, system_batch
from dig_shards.manifest import TRAIN
from torch import Tensor
from torch.nn.functional import pad

from dig_scale.batch import Batch, Context, State, collate, first_sites, padded_to, with_sites
from dig_scale.config import Condition, Recipe, Train
from dig_scale.diffusion.composition import Composition, composition_for, require_sites
from dig_scale.errors import TrainingError
from dig_scale.model.features import features_read, featurise, require_features, without_features
from dig_scale.objectives.denoising import draw_times
from dig_scale.objectives.regression import Labels
from dig_scale.records import LABEL, MISSING_LABEL, PER_SITE, POSITIONS
from dig_scale.system import System
from dig_scale.training.zero import Ranks, Share, share_of
from dig_scale.tree import tree_select, tree_to

NOISE_BLOCK = 64
"""Rows that share a generator: a part of the format of a resumable run."""
_AHEAD = 2
_LABEL_BLOCK = 256
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: clean batch, t [B], standard normal noise of the state's shape, and the processes of its kind; labels of
    the clean structures where a predictor is trained. n_sites is that of the largest row, known without asking the device."""

    batch: Batch
    t: Tensor
    noise: State
    composition: Composition
    n_sites: int
    labels: Labels | None = None

    def trimmed(self) -> MicroBatch:
        """Without the sites that pad every row."""
        context, count = self.batch.context, self.n_sites
        if count == context.n_sites:
            return self
        batch = Batch(first_sites(self.batch.state, count), with_sites(context, count), self.batch.systems)
        return replace(self, batch=batch, noise=first_sites(self.noise, count))

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on `device`; its context is expected there already."""
        batch = Batch(tree_to(self.batch.state, device), self.batch.context, self.batch.systems)
        noise, labels = tree_to(self.noise, device), tree_to(self.labels, device)
        return replace(self, batch=batch, t=self.t.to(device), noise=noise, labels=labels)


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
    """One split of a dataset with the static features of its systems on the training device, and in the memory of the host,
    where batches are made, without features of other networks.

    In mixed batches all contexts are padded to the largest system, so that a row's noise does not depend on its company.
    """

    reader: ShardReader
    systems: tuple[System, ...]
    contexts: tuple[Context, ...]
    host_contexts: tuple[Context, ...]
    compositions: tuple[Composition, ...]
    conditions: tuple[Condition, ...]
    label: Callable[[TrainingData, np.ndarray, State], Labels] | None = None
    """What a predictor learns of frames and their clean states; see training.labels."""
    first_time: float = 0.0
    """Frames are denoised from this t on; see training.posterior for what is learned below it."""

    def micro_batch(self, ids: np.ndarray, t: Tensor, noise: State) -> MicroBatch:
        """Read frames of systems of one kind."""
        rows = self.system_of(ids)
        state = self.clean(ids)
        context = self._conditioned(collate([self.contexts[row] for row in rows]), ids)
        batch = Batch(state, context, tuple(dict.fromkeys(self.systems[row].name for row in rows)))
        labels = None if self.label is None else self.label(self, ids, state)
        largest = max(self.systems[row].n_sites for row in set(rows.tolist()))
        return MicroBatch(batch, t, noise, self.compositions[rows[0]], largest, labels)

    def clean(self, ids: np.ndarray) -> State:
        """Clean states of frames of systems of one kind."""
        rows = self.system_of(ids)
        composition = self.compositions[rows[0]]
        arrays = {name: self.stored(ids, name) for name in composition.stored}
        return composition.state(arrays, self.host_context(rows), _places(ids))

    def host_context(self, rows: np.ndarray) -> Context:
        """The context of a batch of these systems, in the memory of the host."""
        return collate([self.host_contexts[row] for row in rows])

    @property
    def frames(self) -> tuple[int, ...]:
        """Number of frames of every system."""
        return tuple(int(count) for count in np.diff(self.reader.offsets))

    def system_of(self, ids: np.ndarray) -> np.ndarray:
        """Numbers of the systems that frames belong to."""
        return np.searchsorted(self.reader.offsets, ids, side="right") - 1

    def stored(self, ids: np.ndarray, name: str) -> Tensor:
        """One stored field [B, ...] of frames; per-site fields of mixed batches are padded with 0."""
        rows = self.system_of(ids)
        if (rows == rows[0]).all() and self.contexts[rows[0]].n_sites == self.systems[rows[0]].n_sites:
            return torch.from_numpy(self.reader.read_batch(ids, name)).float()
        found: dict[int, Tensor] = {}
        for part in self.reader.read(ids, [name]):
            values = torch.from_numpy(part.arrays[name]).float()
            missing = self.contexts[part.system].n_sites - self.systems[part.system].n_sites
            if name in PER_SITE:
                values = pad(values, (0, 0) * (values.dim() - 2) + (0, missing))
            found |= dict(zip(part.places.tolist(), values, strict=True))
        return torch.stack([found[place] for place in range(len(ids))])

    def _conditioned(self, context: Context, ids: np.ndarray) -> Context:
        """The context with the properties of these frames, where the model has conditions."""
        if not self.conditions:
            return context
        values = [(self.stored(ids, LABEL + c.name) - c.centre) / c.spread for c in self.conditions]
        condition = torch.stack(values, dim=1).to(context.present.device)
        known = torch.isfinite(condition)
        return replace(context, condition=torch.where(known, condition, 0.0), known=known)


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
        _require_labels(dataset, system, [spec.name for spec in entry.fields], recipe)
        stored = entry.spec(POSITIONS).shape
        if stored != (system.n_sites, 3):
            raise TrainingError(
                f"{dataset}: positions of system {system.name!r} are stored as {stored}, expected ({system.n_sites}, 3)"
            )
    contexts = tuple(featurise(system) for system in systems)
    compositions = tuple(composition_for(system.kind, recipe.diffusion) for system in systems)
    for system, context, composition in zip(systems, contexts, compositions, strict=True):
        require_sites(composition, context, recipe.model.sites, system.name)
        require_features(system, recipe.model)
    contexts = tuple(features_read(context, recipe.model) for context in contexts)
    if recipe.train is not None and recipe.train.batches == "mixed":
        _require_alike(dataset, systems, compositions)
        contexts = padded_to(contexts, max(system.n_sites for system in systems))
    if split == TRAIN:
        _require_known(dataset, reader, recipe)
    on_device = tuple(context.to(device) for context in contexts)
    on_host = tuple(without_features(context) for context in contexts)
    return TrainingData(reader, systems, on_device, on_host, compositions, recipe.model.conditions)


def require_positions_alone(data: TrainingData, taker: str) -> None:
    """Raises TrainingError for a system whose state is more than positions, which `taker` of the recipe cannot take."""
    for system, composition in zip(data.systems, data.compositions, strict=True):
        if set(composition.fields) != {POSITIONS}:
            raise TrainingError(
                f"system {system.name!r} diffuses in {', '.join(composition.fields)}, but {taker} takes systems of atoms, whose "
                "positions alone do"
            )


def _require_alike(dataset: Path, systems: tuple[System, ...], compositions: tuple[Composition, ...]) -> None:
    processes = [{name: field.process for name, field in one.fields.items()} for one in compositions]
    for system, found in zip(systems, processes, strict=True):
        if found != processes[0] or system.periodic != systems[0].periodic:
            raise TrainingError(
                f"{dataset}: systems {systems[0].name!r} and {system.name!r} cannot share a batch, as they have other "
                "diffusing fields or periodic directions: set train.batches = 'one-system'"
            )


def _require_labels(dataset: Path, system: System, stored: list[str], recipe: Recipe) -> None:
    missing = [c.name for c in recipe.model.conditions if LABEL + c.name not in stored]
    if missing:
        there = ", ".join(name.removeprefix(LABEL) for name in stored if name.startswith(LABEL)) or "none"
        raise TrainingError(
            f"{dataset}: frames of system {system.name!r} have no label {missing[0]!r} that the model is to be "
            f"conditioned on; labels there: {there}"
        )


def _require_known(dataset: Path, reader: ShardReader, recipe: Recipe) -> None:
    """Raises TrainingError for a property that no frame has; one frame that has it is looked for, block by block."""
    for condition in recipe.model.conditions:
        blocks = (
            np.arange(low, min(low + _LABEL_BLOCK, stop))
            for start, stop in zip(reader.offsets[:-1], reader.offsets[1:], strict=True)
            for low in range(start, stop, _LABEL_BLOCK)
        )
        if not any((reader.read_batch(ids, LABEL + condition.name) != MISSING_LABEL).any() for ids in blocks):
            raise TrainingError(
                f"{dataset}: label {condition.name!r}, which the model is to be conditioned on, is missing of every training "
                "frame; import the data with it, or take it out of model.conditions"
            )


def step_input(data: TrainingData, train: Train, ranks: Ranks, step: int, cursor: Cursor) -> StepInput:
    """The rows of this rank in step `step` (0-based); all of one system unless train.batches says otherwise."""
    share = share_of(train, ranks.world_size)
    ids, next_cursor = _draw_ids(data.reader, cursor, train, ranks)
    first = ranks.rank * share.rows
    times = draw_times(train.global_batch, train.time_sampling, counter_generator(train.seed, "times", step))
    times = data.first_time + (1 - data.first_time) * times
    hidden = torch.rand(train.global_batch, generator=counter_generator(train.seed, "hidden", step))
    noise = noise_rows(data, ids, train.seed, f"noise {step}", range(first, first + share.rows))
    mine = slice(first, first + share.rows)
    rows = _Rows(ids, times[mine], hidden[mine] < train.condition_dropout, noise)
    return StepInput(ids, tuple(_micro_batches(data, rows, share)), next_cursor)


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
        noise = noise_rows(data, ids, train.seed, f"validation {system}", range(low, high))
        yield ValidationBatch(data.micro_batch(ids, times, noise), float(number < len(parts)))


def counter_generator(seed: int, purpose: str, counter: int) -> torch.Generator:
    """A generator that depends on its three arguments only."""
    digest = hashlib.blake2b(f"dig-training/{seed}/{purpose}/{counter}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _places(ids: np.ndarray) -> Tensor:
    """A number in [0, 1) for each frame that depends on its id only: a low-discrepancy sequence."""
    return torch.from_numpy((0.5 + _GOLDEN * ids.astype(np.float64)) % 1.0)


def noise_rows(data: TrainingData, ids: np.ndarray, seed: int, purpose: str, rows: range) -> State:
    """Standard normal noise of the given rows of a global batch, whose frames are `ids`, by blocks of NOISE_BLOCK rows."""
    blocks = range(rows.start // NOISE_BLOCK, -(-rows.stop // NOISE_BLOCK))
    systems = data.system_of(ids)
    context, composition = data.host_context(systems), data.compositions[systems[0]]
    shape = (NOISE_BLOCK, composition.normals(context))
    drawn = [torch.randn(shape, generator=counter_generator(seed, purpose, block)) for block in blocks]
    offset = rows.start - blocks.start * NOISE_BLOCK
    return composition.noise(torch.cat(drawn)[offset : offset + len(rows)], context)


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


def _draw_ids(reader: ShardReader, cursor: Cursor, train: Train, ranks: Ranks) -> tuple[np.ndarray, Cursor]:
    size = train.global_batch
    if len(reader.systems) == 1 or train.batches == "mixed":
        return batch_ids(cursor, reader.n_frames, size, ranks.rank, ranks.world_size)
    drawn = system_batch(cursor, reader.offsets, size, ranks.rank, ranks.world_size)
    return drawn.frame_ids, drawn.next_cursor


@dataclass(frozen=True)
class _Rows:
    """The rows of a rank in one step: frames, times, whose properties are hidden, and noise."""

    ids: np.ndarray
    t: Tensor
    hidden: Tensor
    noise: State


def _micro_batches(data: TrainingData, rows: _Rows, share: Share) -> Iterator[MicroBatch]:
    for low in range(0, share.rows, share.micro_batch):
        part = slice(low, low + share.micro_batch)
        noise = tree_select(rows.noise, torch.arange(low, min(low + share.micro_batch, share.rows)))
        micro = data.micro_batch(rows.ids[part], rows.t[part], noise)
        yield _with_hidden(micro, rows.hidden[part]) if data.conditions else micro


def _with_hidden(micro: MicroBatch, hidden: Tensor) -> MicroBatch:
    """The micro-batch with the properties of some rows unknown."""
    context = micro.batch.context
    known = context.known & ~hidden.to(context.known.device).unsqueeze(1)
    batch = replace(micro.batch, context=replace(context, known=known))
    return replace(micro, batch=batch)
