"""Where attention takes its additive pair bias from: nowhere, a dense flat tensor, or a table of one scalar per pair.

`PairTable` is what callers make; `Source` is the flat form that operators and kernels read. Shapes: T sites, H heads,
C >= H tabulated channels (the first H are the bias), K knots, n atom types; flat pair tensors as in layout.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import torch
from torch import Tensor

from dig_kernels.layout import Packing, blocks_from_dense, pitch_of
from dig_kernels.pair_source import GivenScalar, PairGeometry, PairSource, check_source, check_static
from dig_kernels.radial_table import KnotGrid
from dig_kernels.reference import distances, hermite, pair_scalar


class SourceKind(IntEnum):
    """Kinds of bias, as the kernels number them."""

    NONE = 0
    DENSE = 1
    GIVEN = 2
    """Tabulated, u given."""
    GEOMETRY = 3
    """Tabulated, u from positions."""


@dataclass(frozen=True)
class PairTable:
    """Bias f_h(u_ij) + static: pieces [K-1, 4, C] on `grid`, u given or from geometry, blocks [H * static pairs] by system."""

    pieces: Tensor
    grid: KnotGrid
    source: PairSource
    static: Tensor | None = None


@dataclass(frozen=True)
class Source:
    """A bias as operators take it: tensors by kind, static block (or none) and the table's grid.

    NONE (), DENSE (bias), GIVEN (table, u), GEOMETRY (table, positions, types, gain, shift), where table [H, K-1, 4] is the
    biased part of the pieces, head first, so that the four coefficients a pair needs stand side by side.
    """

    kind: SourceKind
    tensors: tuple[Tensor, ...] = ()
    static: Tensor | None = None
    start: float = 0.0
    step: float = 1.0

    @property
    def flat(self) -> list[Tensor]:
        """All tensors, the static block last."""
        return [*self.tensors, *([self.static] if self.static is not None else [])]


def source_from_flat(kind: int, tensors: Sequence[Tensor], start: float, step: float) -> Source:
    """Inverse of `Source.flat`."""
    counts = {SourceKind.NONE: 0, SourceKind.DENSE: 1, SourceKind.GIVEN: 2, SourceKind.GEOMETRY: 5}
    count = counts[SourceKind(kind)]
    static = tensors[count] if len(tensors) > count else None
    return Source(SourceKind(kind), tuple(tensors[:count]), static, start, step)


def dense_source(bias: Tensor | None, packing: Packing, heads: int) -> Source:
    """Source of a flat bias [H * pairs] in fp32, bf16 or fp16, or of none; raises ValueError where its shape disagrees."""
    if bias is None:
        return Source(SourceKind.NONE)
    if tuple(bias.shape) != (heads * packing.pairs,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; {heads} heads of {packing.pairs} pairs need {(heads * packing.pairs,)}"
        )
    return Source(SourceKind.DENSE, (bias.contiguous(),))


def table_source(table: PairTable, packing: Packing, heads: int) -> Source:
    """Source of a PairTable, differentiable in its tensors; raises ValueError naming the tensor that does not fit."""
    pieces, source = table.pieces, table.source
    if pieces.dim() != 3 or pieces.shape[0] != table.grid.knots - 1 or pieces.shape[1] != 4 or pieces.shape[2] < heads:
        expected = f"[{table.grid.knots - 1}, 4, at least {heads}]"
        raise ValueError(
            f"pieces have shape {tuple(pieces.shape)}; {table.grid.knots} knots and {heads} heads need {expected}"
        )
    if isinstance(source, PairGeometry) and source.images is not None:
        raise ValueError(
            "attention from a table takes no periodic images; fold them into a dense bias (pair_bias.pair_channels)"
        )
    check_source(source, packing)
    if table.static is not None:
        check_static(table.static, packing, heads)
    head_first = _wide(pieces[..., :heads].permute(2, 0, 1)).contiguous()
    grid = (table.grid.start, table.grid.step)
    if isinstance(source, GivenScalar):
        return Source(SourceKind.GIVEN, (head_first, _wide(source.u).contiguous()), table.static, *grid)
    geometry = (_wide(source.positions), source.types.int(), _wide(source.gain), _wide(source.shift))
    return Source(SourceKind.GEOMETRY, (head_first, *(tensor.contiguous() for tensor in geometry)), table.static, *grid)


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32, in which the table is looked up."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def sample_biases(source: Source, packing: Sequence[Tensor], heads: int) -> Iterator[Tensor | None]:
    """The bias [H, L, L] of one sample after another (None without a bias); differentiable."""
    bounds, pair_offsets, system, static_offsets = (tensor.tolist() for tensor in packing)
    for sample, (begin, end) in enumerate(pairwise(bounds)):
        length = end - begin
        if source.kind is SourceKind.NONE:
            yield None
            continue
        if source.kind is SourceKind.DENSE:
            yield pair_block(source.tensors[0], heads * pair_offsets[sample], length, heads)
            continue
        u = sample_scalar(source, begin, end, pair_offsets[sample])
        bias = hermite(source.tensors[0].permute(1, 2, 0), u, source.start, source.step).permute(2, 0, 1)
        if source.static is not None:
            bias = bias + pair_block(source.static, heads * static_offsets[system[sample]], length, heads)
        yield bias


def dense_bias(source: Source, packing: Sequence[Tensor], heads: int) -> Tensor | None:
    """The whole bias, flat [H * pairs]; differentiable. O(L²) memory: for the reference path."""
    if source.kind is SourceKind.NONE:
        return None
    if source.kind is SourceKind.DENSE:
        return source.tensors[0]
    return blocks_from_dense([bias for bias in sample_biases(source, packing, heads) if bias is not None])


def sample_scalar(source: Source, begin: int, end: int, pair_offset: int) -> Tensor:
    """u [L, L] of a tabulated source for the sample of sites begin .. end whose pairs start at pair_offset."""
    if source.kind is SourceKind.GIVEN:
        return pair_block(source.tensors[1], pair_offset, end - begin, 1)[0]
    _, positions, types, gain, shift = source.tensors
    here, kinds = positions[begin:end], types[begin:end].long()
    return pair_scalar(distances(here, here), kinds, kinds, gain, shift)


def pair_block(flat: Tensor, start: int, length: int, channels: int) -> Tensor:
    """The view [channels, L, L] of one block of a flat pair tensor."""
    pitch = pitch_of(length)
    return flat[start : start + channels * length * pitch].view(channels, length, pitch)[..., :length]
