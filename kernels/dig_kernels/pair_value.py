"""Pair values: sum_j a_hij W_h z_ij from attention weights a, pair representation z and per-head projections W.

W_h is taken out of the sum: aggregate C channels over keys first, project [rows, C] after. That is one batched matrix product
per query row, [G H, P] x [P, C], in which the G samples of one system share its z, and no [L, P, H c] tensor. Matrix products
are the library's; there is no kernel of our own here. Differentiable any number of times; knows no frames, no layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dig_kernels import reference_heads as reference
from dig_kernels.dispatch import Backend
from dig_kernels.layout import Packing, pitch_of


@dataclass(frozen=True)
class SystemRun:
    """Consecutive samples of one system in a packed batch: where their pairs (of one channel) begin, how many, how long."""

    system: int
    first_pair: int
    samples: int
    length: int


def system_runs(packing: Packing) -> tuple[SystemRun, ...]:
    """Runs of samples of one system, in order; waits for the device, so make them once per batch."""
    lengths, starts = packing.cu_seqlens.diff().tolist(), packing.pair_offsets.tolist()
    runs = []
    for system, group in groupby(enumerate(packing.system.tolist()), key=lambda entry: entry[1]):
        samples = [b for b, _ in group]
        runs.append(SystemRun(system, starts[samples[0]], len(samples), lengths[samples[0]]))
    return tuple(runs)


def pair_value(weights: Tensor, pair: Tensor, projection: Tensor, *, backend: Backend | None = None) -> Tensor:
    """[G, L, H, c] from weights [G, H, L, P] of G samples of one system, pair [L, P, C] and projection [H, c, C].

    Raises ValueError on shapes that disagree.
    """
    samples, heads, length, keys = weights.shape
    channels = projection.shape[-1]
    if pair.shape != (length, keys, channels) or projection.shape[0] != heads:
        raise ValueError(
            f"weights {tuple(weights.shape)}, pair {tuple(pair.shape)} and projection {tuple(projection.shape)} should be "
            "[G, H, L, P], [L, P, C] and [H, c, C]"
        )
    if backend is Backend.REFERENCE:
        return reference.pair_value(weights, pair, projection)
    rows = weights.permute(2, 0, 1, 3).reshape(length, samples * heads, keys)
    gathered = torch.bmm(rows.to(pair.dtype), pair).view(length, samples, heads, channels)
    return torch.einsum("lghk,hck->glhc", gathered, projection.to(pair.dtype))


def packed_pair_value(
    weights: Tensor,
    pairs: Sequence[Tensor],
    projection: Tensor,
    runs: Sequence[SystemRun],
    *,
    backend: Backend | None = None,
) -> Tensor:
    """[T, H, c] from weights flat [H * pairs] of a packed batch, one pair tensor [L, L, C] per system, and its system_runs.

    The blocks of a run lie at equal distances, so its weights are one strided view and are not copied.
    """
    heads, outs = projection.shape[0], [projection.new_zeros(0, *projection.shape[:2])]
    for run in runs:
        pitch = pitch_of(run.length)
        shape = (run.samples, heads, run.length, pitch)
        start = heads * run.first_pair
        size = run.samples * heads * run.length * pitch
        block = weights[start : start + size].view(shape)[..., : run.length]
        outs.append(pair_value(block, pairs[run.system], projection, backend=backend).flatten(0, 1))
    return torch.cat([out.to(outs[-1].dtype) for out in outs])
