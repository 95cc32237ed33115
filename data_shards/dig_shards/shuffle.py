"""Shuffle all drawn frames of one system without holding them in memory.

In: the draws of a system, the split, and a memory target. Out: structured rows (rank, validation, source, frame,
fields) in rank order, a bucket at a time. Two passes: every frame is written to the scratch file of its bucket, a
contiguous range of ranks; then each bucket is loaded and sorted. Memory is about `memory_bytes`, or, for a system of
more than 1024 times that, about its size / 1024; scratch space is one uncompressed copy of the system.
The order depends on plan and frame numbers alone, never on the memory target. Knows nothing of tars.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dig_shards.fields import FieldSpec
from dig_shards.plan import Draw, Split, kept_fields, shuffled_rank

_MOST_BUCKETS = 4096


def row_dtype(fields: Sequence[FieldSpec]) -> np.dtype[np.void]:
    """A frame as one structured row: rank, validation, source, frame, and the stored arrays under `fields`."""
    stored = np.dtype([(spec.name, spec.storage, spec.shape) for spec in fields])
    return np.dtype([("rank", "<i8"), ("validation", "?"), ("source", "<i8"), ("frame", "<i8"), ("fields", stored)])


def shuffled_rows(
    draws: Sequence[Draw], split: Split, system: int, scratch: Path, memory_bytes: int, advance: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """Rows of one system's frames in shuffled order, bucket by bucket; `advance` hears of frames read in pass one."""
    fields = kept_fields(draws[0], split.plan)
    dtype = row_dtype(fields)
    total = sum(draw.count for draw in draws)
    # A bucket, its sorted copy and the rows a member takes from it live together: hence a quarter of the target.
    per_bucket = max(1, memory_bytes // (4 * dtype.itemsize), -(-total // _MOST_BUCKETS))
    first = 0
    for draw in draws:
        for drawn in _portions(draw, per_bucket):
            rows = _read_rows(draw, drawn, fields, dtype)
            rows["rank"] = shuffled_rank(first + drawn, total, split.plan, system)
            rows["validation"] = split.is_validation(draw, drawn)
            _scatter(rows, per_bucket, scratch)
            advance(len(rows))
        first += draw.count
    for bucket in range(-(-total // per_bucket)):
        file = scratch / str(bucket)
        rows = np.fromfile(file, dtype)
        file.unlink()
        yield rows[np.argsort(rows["rank"])]


def _portions(draw: Draw, at_most: int) -> Iterator[np.ndarray]:
    """Drawn frame numbers in runs that end where chunks of the store end, so that each chunk is decoded once."""
    chunk = draw.reader.chunk_frames
    span = chunk if draw.stride >= chunk else max(1, at_most // chunk) * chunk
    begin = 0
    while begin < draw.count:
        frame = draw.start + begin * draw.stride
        boundary = (frame // span + 1) * span
        end = min(draw.count, begin + -(-(boundary - frame) // draw.stride))
        yield np.arange(begin, end)
        begin = end


def _read_rows(draw: Draw, drawn: np.ndarray, fields: Sequence[FieldSpec], dtype: np.dtype[np.void]) -> np.ndarray:
    frames = draw.start + drawn * draw.stride
    rows = np.empty(len(drawn), dtype)
    rows["source"] = draw.number
    rows["frame"] = frames
    for spec in fields:
        stored = draw.reader.read_raw(spec.name, int(frames[0]), int(frames[-1]) + 1)
        kept = draw.rows.get(spec.name)
        drawn_frames = stored[:: draw.stride]
        rows["fields"][spec.name] = drawn_frames if kept is None else drawn_frames[:, list(kept)]
    return rows


def _scatter(rows: np.ndarray, per_bucket: int, scratch: Path) -> None:
    bucket = rows["rank"] // per_bucket
    order = np.argsort(bucket, kind="stable")
    buckets, starts = np.unique(bucket[order], return_index=True)
    for number, part in zip(buckets.tolist(), np.split(order, starts[1:]), strict=True):
        # Reopened each time: thousands of buckets must not need thousands of open files.
        with open(scratch / str(number), "ab") as stream:
            rows[part].tofile(stream)
