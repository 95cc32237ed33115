"""Sums over segments: for every segment s and power m, the sum of row · f^m over the elements whose key is s.

The transpose of a table lookup, without atomics: elements are sorted by key (stable), runs of equal keys are cut into
chunks of bounded length whose bounds are found on the device, one program sums a chunk and a second kernel adds the
chunks of a segment in order. So the result is the same on every repetition and the host never waits. Needs Triton.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from dig_kernels.compiling import CompileCase


@dataclass(frozen=True)
class MomentsLaunch:
    """Elements per chunk, and the tile of elements x channels that a program holds at a time."""

    chunk: int = 1024
    tile: int = 2048
    channels: int = 64
    warps: int = 4


LAUNCH = MomentsLaunch()


@triton.jit
def chunk_moments_kernel(
    partial,
    order,
    f,
    rows,
    row_index,
    bounds,
    chunk_starts,
    chunk_segment,
    segments,
    channels,
    INDEXED: tl.constexpr,
    MOMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """partial[chunk, m, c] = sum over the chunk of rows[., c] f^m; chunks beyond the last do nothing."""
    chunk = tl.program_id(0)
    segment = tl.load(chunk_segment + chunk)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    wide = channel < channels
    if segment < segments:
        begin = tl.load(bounds + segment) + (chunk - tl.load(chunk_starts + segment)) * CHUNK
        end = tl.minimum(begin + CHUNK, tl.load(bounds + segment + 1))
        sum0 = tl.zeros((BLOCK, BLOCK_CHANNELS), dtype=tl.float32)
        sum1 = tl.zeros((BLOCK, BLOCK_CHANNELS), dtype=tl.float32)
        sum2 = tl.zeros((BLOCK, BLOCK_CHANNELS), dtype=tl.float32)
        sum3 = tl.zeros((BLOCK, BLOCK_CHANNELS), dtype=tl.float32)
        for first in range(begin, end, BLOCK):
            place = first + tl.arange(0, BLOCK)
            here = place < end
            element = tl.load(order + place, mask=here, other=0)
            fraction = tl.load(f + element, mask=here, other=0.0)[:, None]
            if INDEXED:
                row = tl.load(row_index + element, mask=here, other=-1).to(tl.int64)
                here = row >= 0
            else:
                row = element.to(tl.int64)
            address = rows + row[:, None] * channels + channel[None, :]
            value = tl.load(address, mask=here[:, None] & wide[None, :], other=0.0).to(tl.float32)
            sum0 += value
            if MOMENTS > 1:
                value = value * fraction
                sum1 += value
            if MOMENTS > 2:
                value = value * fraction
                sum2 += value
            if MOMENTS > 3:
                value = value * fraction
                sum3 += value
        out = partial + chunk.to(tl.int64) * (MOMENTS * channels) + channel
        tl.store(out, tl.sum(sum0, 0), mask=wide)
        if MOMENTS > 1:
            tl.store(out + channels, tl.sum(sum1, 0), mask=wide)
        if MOMENTS > 2:
            tl.store(out + 2 * channels, tl.sum(sum2, 0), mask=wide)
        if MOMENTS > 3:
            tl.store(out + 3 * channels, tl.sum(sum3, 0), mask=wide)


@triton.jit
def add_chunks_kernel(
    out, partial, chunk_starts, chunk_segment, segments, width, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """out[segment, e] = sum of partial[chunk, e] over the segment's chunks, by the program of the first of them."""
    chunk = tl.program_id(0)
    segment = tl.load(chunk_segment + chunk)
    element = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    if segment < segments:
        begin = tl.load(chunk_starts + segment)
        if begin == chunk:
            end = tl.load(chunk_starts + segment + 1)
            total = tl.zeros((BLOCK, BLOCK_WIDTH), dtype=tl.float32)
            for first in range(begin, end, BLOCK):
                row = first + tl.arange(0, BLOCK)
                address = partial + row.to(tl.int64)[:, None] * width + element[None, :]
                total += tl.load(address, mask=(row < end)[:, None] & (element < width)[None, :], other=0.0)
            tl.store(out + segment.to(tl.int64) * width + element, tl.sum(total, 0), mask=element < width)


@dataclass(frozen=True)
class SortedSegments:
    """Elements by key: order [n], bounds [segments+1] of the runs, and the chunks that the runs are cut into."""

    order: Tensor
    bounds: Tensor
    chunk_starts: Tensor
    chunk_segment: Tensor
    segments: int


def key_dtype(segments: int) -> torch.dtype:
    """The narrowest integer that holds keys 0 .. segments: half the sorting work where 16 bits do."""
    return torch.int16 if segments < 2**15 else torch.int32


def sort_segments(keys: Tensor, segments: int) -> SortedSegments:
    """Stable order of keys [n] in 0 .. segments; elements with key `segments` belong to none."""
    ordered, order = torch.sort(keys, stable=True)
    edges = torch.arange(segments + 1, dtype=keys.dtype, device=keys.device)
    bounds = torch.searchsorted(ordered, edges, out_int32=True)
    counts = torch.div(bounds.diff() + (LAUNCH.chunk - 1), LAUNCH.chunk, rounding_mode="floor")
    starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    most = min(segments, len(keys)) + triton.cdiv(len(keys), LAUNCH.chunk)
    chunks = torch.arange(most, dtype=torch.int32, device=keys.device)
    owner = torch.searchsorted(starts[1:], chunks, right=True, out_int32=True)
    return SortedSegments(order, bounds, starts, owner, segments)


def segment_moments(by_key: SortedSegments, f: Tensor, rows: Tensor, row_index: Tensor | None, moments: int) -> Tensor:
    """[segments, moments, C] fp32: sums of row · f^m for m < moments (at most 4), f [n], rows [R, C] contiguous.

    Element e has row e, or row_index[e] where row_index [n] is given; elements with a negative index have none.
    """
    if not 1 <= moments <= 4:
        raise ValueError(f"moments is {moments}, expected 1 to 4")
    channels = rows.shape[1]
    out = rows.new_zeros(by_key.segments, moments, channels, dtype=torch.float32)
    if not out.numel() or not len(by_key.order):
        return out
    block = min(LAUNCH.channels, triton.next_power_of_2(channels))
    partial = rows.new_empty(len(by_key.chunk_segment), moments, channels, dtype=torch.float32)
    chunk_moments_kernel[(len(partial), triton.cdiv(channels, block))](
        partial,
        by_key.order,
        f,
        rows,
        row_index,
        by_key.bounds,
        by_key.chunk_starts,
        by_key.chunk_segment,
        by_key.segments,
        channels,
        INDEXED=row_index is not None,
        MOMENTS=moments,
        CHUNK=LAUNCH.chunk,
        BLOCK=min(LAUNCH.tile // block, LAUNCH.chunk),
        BLOCK_CHANNELS=block,
        num_warps=LAUNCH.warps,
    )
    width = moments * channels
    block = min(256, triton.next_power_of_2(width))
    add_chunks_kernel[(len(partial), triton.cdiv(width, block))](
        out,
        partial,
        by_key.chunk_starts,
        by_key.chunk_segment,
        by_key.segments,
        width,
        BLOCK=8,
        BLOCK_WIDTH=block,
        num_warps=LAUNCH.warps,
    )
    return out


def compile_cases() -> list[CompileCase]:
    """The chosen configurations: 32 table channels, node channels by site, and gain and shift."""
    from dig_kernels.compiling import CompileCase

    pointers = {"partial": "*fp32", "order": "*i64", "f": "*fp32", "rows": "*fp32", "row_index": "*i32"}
    bounds = {"bounds": "*i32", "chunk_starts": "*i32", "chunk_segment": "*i32", "segments": "i32", "channels": "i32"}
    cases = []
    for name, channels, indexed, moments in (("rows", 32, False, 4), ("node", 64, True, 4), ("maps", 1, False, 2)):
        constants = {
            "INDEXED": indexed,
            "MOMENTS": moments,
            "CHUNK": LAUNCH.chunk,
            "BLOCK": min(LAUNCH.tile // channels, LAUNCH.chunk),
            "BLOCK_CHANNELS": channels,
        } | ({} if indexed else {"row_index": None})
        signature = {**pointers, **bounds, **dict.fromkeys(constants, "constexpr")}
        case = CompileCase(f"moments_{name}", chunk_moments_kernel, signature, constants, LAUNCH.warps)
        cases.append(case)
    signature = {"out": "*fp32", "partial": "*fp32", "chunk_starts": "*i32", "chunk_segment": "*i32"}
    signature |= {"segments": "i32", "width": "i32"}
    constants = {"BLOCK": 8, "BLOCK_WIDTH": 128}
    signature |= dict.fromkeys(constants, "constexpr")
    cases.append(CompileCase("moments_add", add_chunks_kernel, signature, constants, LAUNCH.warps))
    return cases
