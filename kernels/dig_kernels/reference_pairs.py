"""The oracle of the pair bias generator: channels of one scalar per pair, over a packed batch, with periodic copies.

Plain PyTorch for any floating dtype. The lookup of channels is an argument: with reference.hermite it is differentiable
any number of times and in forward mode; the CPU form passes radial_table.evaluate_pieces, which keeps no [.., 4 C] graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dig_kernels import reference
from dig_kernels.layout import blocks_from_dense, dense_from_blocks, static_from_blocks
from dig_kernels.pair_source import GivenScalar, PairGeometry, PairProblem
from dig_kernels.radial_table import KnotGrid, evaluate_pieces

Lookup = Callable[[Tensor, Tensor, KnotGrid], Tensor]
"""Channels [..., C] from pieces [K-1, 4, C], u [...] and the grid."""

PAIRS_AT_ONCE = 2**15
"""Pairs looked up together: bounds the [pairs, 4 C] rows of the table that are in memory at a time."""


def pair_channels(problem: PairProblem, lookup: Lookup) -> tuple[Tensor, Tensor]:
    """Bias flat [biased * pairs] and summed channels [T, C - biased], in the dtype of the table."""
    packing, biased = problem.packing, problem.biased
    if not packing.batch:
        return problem.pieces.new_zeros(0), problem.pieces.new_zeros(0, problem.pieces.shape[-1] - biased)
    statics: Sequence[Tensor | None] = [None] * packing.batch
    if problem.static is not None:
        statics = static_from_blocks(problem.static, packing, biased)
    biases, sums = [], []
    for (u, key, begin, end), static in zip(_samples(problem), statics, strict=True):
        mask = problem.key_mask[begin:end] != 0 if problem.key_mask is not None else None
        bias, node = _sample_channels(problem, lookup, u, key, mask)
        biases.append(bias if static is None else bias + static)
        sums.append(node)
    return blocks_from_dense(biases), torch.cat(sums)


def pair_channels_reference(problem: PairProblem) -> tuple[Tensor, Tensor]:
    """pair_channels by the formula."""
    return pair_channels(problem, lambda pieces, u, grid: reference.hermite(pieces, u, grid.start, grid.step))


def pair_channels_cpu(problem: PairProblem) -> tuple[Tensor, Tensor]:
    """pair_channels by table lookup with derivatives by hand."""
    return pair_channels(problem, evaluate_pieces)


def _sample_channels(
    problem: PairProblem, lookup: Lookup, u: Tensor, key: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Bias [biased, L, L] and sums [L, C - biased] of one sample from u [L, P]; copy p is of key[p] (None: of p)."""
    length = len(u)
    counted = mask[key] if mask is not None and key is not None else mask
    biases, sums = [], [problem.pieces.new_zeros(0, problem.pieces.shape[-1] - problem.biased)]
    for rows in u.split(max(1, PAIRS_AT_ONCE // max(u.shape[1], 1))):
        channels = lookup(problem.pieces, rows, problem.grid)
        bias, summed = channels.split((problem.biased, channels.shape[-1] - problem.biased), dim=-1)
        if counted is not None:
            summed = torch.where(counted.unsqueeze(-1), summed, 0.0)
        sums.append(summed.sum(1))
        biases.append(bias.permute(2, 0, 1))
    bias = torch.cat(biases, dim=1) if length else problem.pieces.new_zeros(problem.biased, 0, 0)
    if key is not None and length:
        bias = reference.fold_images(bias, key, length)
    return bias, torch.cat(sums)


def _samples(problem: PairProblem) -> Iterator[tuple[Tensor, Tensor | None, int, int]]:
    """u [L, P], the key of each copy [P] (None without images), and the sites begin, end of every sample."""
    source, bounds = problem.source, problem.packing.cu_seqlens.tolist()
    spans = list(pairwise(bounds))
    if isinstance(source, GivenScalar):
        blocks = dense_from_blocks(source.u, problem.packing, 1)
        for (begin, end), block in zip(spans, blocks, strict=True):
            yield block[0], None, begin, end
        return
    for begin, end in spans:
        u, key = _geometry_sample(source, begin, end)
        yield u, key, begin, end


def _geometry_sample(source: PairGeometry, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
    positions, types = source.positions[begin:end], source.types[begin:end].long()
    if source.images is None:
        distance = reference.distances(positions, positions)
        return reference.pair_scalar(distance, types, types, source.gain, source.shift), None
    starts = source.images.starts[begin : end + 1].long()
    key = torch.repeat_interleave(torch.arange(end - begin, device=starts.device), starts.diff())
    offsets = source.images.offsets[int(starts[0]) : int(starts[-1])].to(positions.dtype)
    distance = reference.distances(positions, positions[key] + offsets)
    return reference.pair_scalar(distance, types, types[key], source.gain, source.shift), key
