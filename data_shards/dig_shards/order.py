"""The order in which a run consumes records: a pure function of three integers.

In: a Cursor, the number of records, the global batch size, rank and world size. Out: this rank's frame ids and the next
Cursor. The order over all ranks is the counter-based permutation of each epoch, so it depends on neither the number of
ranks nor of loader workers, and a run resumes at any world size from its Cursor. Knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dig_shards.errors import ShardError
from dig_shards.permutation import permute


@dataclass(frozen=True)
class Cursor:
    """The whole state of a data loader: `consumed` records, over all ranks, of epoch `epoch` of the order of `seed`."""

    seed: int
    epoch: int = 0
    consumed: int = 0


@dataclass(frozen=True)
class SystemBatch:
    """This rank's part of a batch drawn from one system, and where the run stands after it."""

    system: int
    frame_ids: np.ndarray
    next_cursor: Cursor


def batch_ids(cursor: Cursor, n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, Cursor]:
    """This rank's frame ids, int64 [batch_size / world_size], of the next global batch, and the next cursor.

    The global batch is the next `batch_size` records of the endless sequence: permutation of epoch 0, then of epoch 1,
    and so on. At the end of an epoch a batch holds the tail of it followed by the head of the next, so no record is
    dropped and none repeats within an epoch. Rank r takes the r-th contiguous part of the batch. The batch size may
    change between calls. Raises ShardError if it is not a multiple of the world size, or the cursor does not fit n.
    """
    share = _share(batch_size, rank, world_size)
    if n < 1 or not 0 <= cursor.consumed < n:
        raise ShardError(f"{cursor} does not fit a data set of {n} records; was it saved with another one?")
    ids = stream_ids(np.arange(share.start, share.stop) + cursor.consumed, n, cursor.seed, cursor.epoch)
    epochs, consumed = divmod(cursor.consumed + batch_size, n)
    return ids, Cursor(cursor.seed, cursor.epoch + epochs, consumed)


def stream_ids(positions: np.ndarray, n: int, seed: int, epoch: int = 0) -> np.ndarray:
    """Record ids at positions (ascending) of the sequence that joins the permutations of `epoch`, `epoch` + 1, ..."""
    epochs, places = np.divmod(positions, n)
    ids = np.empty(len(positions), np.int64)
    for number in np.unique(epochs):
        here = epochs == number
        ids[here] = permute(places[here], n, seed, epoch + int(number))
    return ids


def system_batch(
    cursor: Cursor, offsets: np.ndarray, batch_size: int, rank: int = 0, world_size: int = 1
) -> SystemBatch:
    """The next batch when every batch must come from one system, as for systems of different atom counts.

    `offsets` [systems + 1] says that system s holds the frame ids offsets[s]..offsets[s + 1] (ShardReader.offsets).
    Each system is its own endless sequence of permutations, as in `batch_ids`, cut into batches of `batch_size`. Epoch
    e holds those batches that end in pass e over their system: floor((e + 1) N / B) - floor(e N / B) of them for a
    system of N frames. Their order over systems is again the permutation of (seed, epoch). So every record of a system
    comes once before any comes twice, nothing is dropped, and a system smaller than a batch takes part once in several
    epochs. `consumed` counts records of the present epoch, hence a run keeps its global batch size (its world size may
    change). Raises ShardError for a cursor or batch size that does not fit.
    """
    share = _share(batch_size, rank, world_size)
    counts = np.diff(np.asarray(offsets, np.int64))
    if not counts.sum():
        raise ShardError("no frames to draw batches from: every system is empty in this split")
    if cursor.consumed % batch_size:
        raise ShardError(f"{cursor} is no multiple of batch size {batch_size}; keep the batch size it was saved with")
    cursor, first, ends = _epoch_with_batches(cursor, counts, batch_size)
    place = cursor.consumed // batch_size
    if place >= ends[-1]:
        raise ShardError(f"{cursor} is past the {ends[-1]} batches of its epoch; was it saved with other data?")
    number = int(permute(np.array([place]), int(ends[-1]), cursor.seed, cursor.epoch)[0])
    system = int(np.searchsorted(ends, number, side="right"))
    batch = int(first[system]) + number - (int(ends[system - 1]) if system else 0)
    positions = np.arange(share.start, share.stop) + batch * batch_size
    ids = stream_ids(positions, int(counts[system]), _system_seed(cursor.seed, system)) + int(offsets[system])
    return SystemBatch(system, ids, _after(cursor, batch_size, int(ends[-1])))


def _epoch_with_batches(cursor: Cursor, counts: np.ndarray, batch_size: int) -> tuple[Cursor, np.ndarray, np.ndarray]:
    """The cursor moved past epochs without a batch; each system's first batch number; cumulative batches by system."""
    while True:
        first = cursor.epoch * counts // batch_size
        ends = np.cumsum((cursor.epoch + 1) * counts // batch_size - first)
        if ends[-1]:
            return cursor, first, ends
        cursor = Cursor(cursor.seed, cursor.epoch + 1, 0)


def _after(cursor: Cursor, batch_size: int, batches: int) -> Cursor:
    consumed = cursor.consumed + batch_size
    if consumed == batches * batch_size:
        return Cursor(cursor.seed, cursor.epoch + 1, 0)
    return Cursor(cursor.seed, cursor.epoch, consumed)


def _system_seed(seed: int, system: int) -> int:
    # Distinct from any plain seed below 2^64, so that frames and batches are shuffled independently.
    return (system + 1 << 64) + seed


def _share(batch_size: int, rank: int, world_size: int) -> range:
    if batch_size < 1 or world_size < 1 or batch_size % world_size or not 0 <= rank < world_size:
        raise ShardError(
            f"rank {rank} of {world_size} cannot share a global batch of {batch_size}; "
            f"choose a batch size that is a multiple of the world size"
        )
    size = batch_size // world_size
    return range(rank * size, (rank + 1) * size)
