"""The problem all contenders solve: packed samples, their geometry, a radial bias, random rows; and its fp64 solution.

The bias is one function of the scaled distance per head, as a table; `dense_bias` writes it out once, rounded to the
benchmark's dtype, for contenders that take a dense one. Shapes as in dig_kernels.layout.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from bench.gpu_timing import Bench, Sizes
from dig_kernels import reference
from dig_kernels.layout import Packing, dense_from_blocks, pack_lengths, pitch_of
from dig_kernels.pair_source import PairGeometry
from dig_kernels.radial_table import KnotGrid, hermite_pieces
from torch import Tensor
from torch.nn.functional import gelu, linear

U_STOP = 32.0
"""Last knot of the table."""
DENSITY = 0.1
"""Sites per Å³."""
CHECKED_HEADS = 2
"""Heads of the first sample that are compared with fp64."""
_ROWS_AT_ONCE = 2**18
"""Pairs looked up together while the dense bias is written."""


@dataclass(frozen=True)
class Radial:
    """Gaussians and a two-layer MLP of one scalar: centre and log_width [K], hidden [K, K], out [C, K]."""

    centre: Tensor
    log_width: Tensor
    hidden: Tensor
    out: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """The parameters."""
        return [self.centre, self.log_width, self.hidden, self.out]

    def gaussians(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """exp(-z²/2) [..., K] and its derivative d/du."""
        inverse = torch.exp(-self.log_width)
        z = (u.unsqueeze(-1) - self.centre) * inverse
        value = torch.exp(-0.5 * z * z)
        return value, -z * inverse * value

    def direct(self, u: Tensor) -> Tensor:
        """Channels [..., C] for every u."""
        z = (u.unsqueeze(-1) - self.centre) * torch.exp(-self.log_width)
        return linear(gelu(linear(torch.exp(-0.5 * z * z), self.hidden)), self.out)

    def channels(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Channels and their exact derivatives d/du, [..., C] each."""
        value, slope = self.gaussians(u)
        hidden, rise = linear(value, self.hidden), linear(slope, self.hidden)
        normal = torch.exp(-0.5 * hidden**2) / (2 * torch.pi) ** 0.5
        gelu_slope = 0.5 * (1 + torch.erf(hidden / 2**0.5)) + hidden * normal
        return linear(gelu(hidden), self.out), linear(gelu_slope * rise, self.out)


def make_radial(bench: Bench, channels: int) -> Radial:
    """Random parameters; logits of the order of 1."""
    k, generator = bench.sizes.kernels, torch.Generator(bench.device).manual_seed(1)
    drawn = [torch.randn(rows, k, device=bench.device, generator=generator) for rows in (k, channels)]
    centre = torch.linspace(0, U_STOP, k, device=bench.device)
    log_width = torch.full((k,), U_STOP / k, device=bench.device).log()
    return Radial(centre, log_width, drawn[0] * (4 / k) ** 0.5, drawn[1] * (4 / k) ** 0.5)


@dataclass(frozen=True)
class Problem:
    """Samples of one case: geometry, table [K-1, 4, H] and the sizes of the rows."""

    lengths: tuple[int, ...]
    packing: Packing
    heads: int
    width: int
    dtype: torch.dtype
    geometry: PairGeometry
    pieces: Tensor
    grid: KnotGrid

    @property
    def pair_heads(self) -> int:
        """Logits of one layer that belong to real pairs."""
        return self.heads * sum(length**2 for length in self.lengths)

    @property
    def longest(self) -> int:
        """Sites of the longest sample."""
        return max(self.lengths)


def ragged_lengths(sizes: Sizes) -> list[int]:
    """Log-normal lengths (median 256, sigma 0.7, within 16 and 2048), always the same, that fill the sites."""
    if sizes.shrunk_to is not None:
        return [sizes.shrunk_to, 5]
    generator, lengths, left = random.Random(0), [], sizes.sites
    while left:
        length = min(left, max(16, min(2048, round(256 * generator.lognormvariate(0, 0.7)))))
        lengths.append(length)
        left -= length
    return lengths


def make_problem(bench: Bench, lengths: Sequence[int]) -> Problem:
    """The problem of samples of these lengths, at the density of condensed matter, from a fixed seed."""
    sizes, device = bench.sizes, bench.device
    packing = pack_lengths(lengths, device)
    grid = KnotGrid(0.0, U_STOP, sizes.knots)
    radial = make_radial(bench, sizes.heads)
    pieces = hermite_pieces(*radial.channels(grid.positions(radial.centre)), grid)
    geometry = make_geometry(bench, lengths)
    shape = (sizes.heads, sizes.width, bench.dtype)
    return Problem(tuple(lengths), packing, *shape, geometry, pieces, grid)


def make_geometry(bench: Bench, lengths: Sequence[int]) -> PairGeometry:
    """Random positions in a cube per sample, random types, gain near 1, shift near 0."""
    sizes, device = bench.sizes, bench.device
    generator = torch.Generator(device).manual_seed(2)
    sides = torch.tensor([(length / DENSITY) ** (1 / 3) for length in lengths], device=device)
    side = sides.repeat_interleave(torch.tensor(lengths, device=device))[:, None]
    positions = side * torch.rand(len(side), 3, device=device, generator=generator)
    types = torch.randint(sizes.types, (len(side),), device=device, generator=generator, dtype=torch.int32)
    maps = 0.05 * torch.randn(2, sizes.types, sizes.types, device=device, generator=generator)
    maps = maps + maps.transpose(1, 2)
    return PairGeometry(positions, types, 1 + maps[0], 0.5 + maps[1])


def random_rows(problem: Problem, layer: int) -> list[Tensor]:
    """q, k, v and the gradient of the output [T, H, d] of one layer."""
    device = problem.pieces.device
    generator = torch.Generator(device).manual_seed(100 + layer)
    shape = (problem.packing.sites, problem.heads, problem.width)
    return [torch.randn(shape, device=device, generator=generator).to(problem.dtype) for _ in range(4)]


def sample_bias(problem: Problem, sample: int, heads: int, dtype: torch.dtype) -> Tensor:
    """The table's bias of one sample, [heads, L, L], evaluated in `dtype`."""
    begin = sum(problem.lengths[:sample])
    here = slice(begin, begin + problem.lengths[sample])
    positions, types = problem.geometry.positions[here].to(dtype), problem.geometry.types[here].long()
    gain, shift = problem.geometry.gain.to(dtype), problem.geometry.shift.to(dtype)
    pieces = problem.pieces[..., :heads].to(dtype)
    out = torch.empty(heads, len(types), len(types), dtype=dtype, device=positions.device)
    for rows in torch.arange(len(types), device=types.device).split(max(1, _ROWS_AT_ONCE // max(len(types), 1))):
        u = reference.pair_scalar(reference.distances(positions[rows], positions), types[rows], types, gain, shift)
        out[:, rows] = reference.hermite(pieces, u, problem.grid.start, problem.grid.step).permute(2, 0, 1)
    return out


def table_slice(problem: Problem) -> Tensor:
    """The checked slice [h, L, L] of the bias of contenders that look it up, fp64."""
    return sample_bias(problem, 0, CHECKED_HEADS, torch.float64)


def dense_bias(problem: Problem) -> Tensor:
    """The bias written out in the problem's dtype: flat [H * pairs], zeros in the padding of rows."""
    flat = torch.zeros(problem.heads * problem.packing.pairs, dtype=problem.dtype, device=problem.pieces.device)
    for sample, block in enumerate(dense_from_blocks(flat, problem.packing, problem.heads)):
        block.copy_(sample_bias(problem, sample, problem.heads, torch.float32))
    return flat


def first_block(problem: Problem, flat: Tensor) -> Tensor:
    """The checked heads of the first sample, [h, L, L], of a flat pair tensor."""
    length = problem.lengths[0]
    size = problem.heads * length * pitch_of(length)
    return flat[:size].view(problem.heads, length, pitch_of(length))[:CHECKED_HEADS, :, :length]


@dataclass(frozen=True)
class Solution:
    """Output and gradients of q, k, v and bias of the checked slice, [h, L, d] and [h, L, L]."""

    out: Tensor
    rows: tuple[Tensor, ...]
    bias: Tensor


def solve(rows: Sequence[Tensor], bias: Tensor, scale: float) -> Solution:
    """The slice in fp64 from its q, k, v, dO [h, L, d] and bias [h, L, L]."""
    *inputs, d_out = [tensor.detach().double() for tensor in rows]
    leaves = [tensor.requires_grad_() for tensor in (*inputs, bias.detach().double().clone())]
    out, _ = reference.attention(leaves[0], leaves[1], leaves[2], leaves[3], scale)
    *d_rows, d_bias = torch.autograd.grad(out, leaves, d_out)
    return Solution(out.detach(), tuple(d_rows), d_bias)
