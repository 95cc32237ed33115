"""Tabulated radial channels: C smooth functions of one scalar u per pair, as cubic Hermite pieces on uniform knots.

The pair bias of a Graphormer, MLP(Gaussians(u)), depends on a pair only through the scalar u. So it is evaluated exactly
on T knots and interpolated: the cost is O(T) rows of the MLP instead of O(B L²). Values and first derivatives agree with
the exact function at the knots; the interpolation error is O(step⁴). The table is C1: its second derivative is linear
on a piece and jumps at knots, so where second derivatives in u feed a loss, evaluate the exact function instead.
`build_table` tells whether the table is good enough for a given function. Knows tensors, not molecules.

Notation: on piece k, with f = (u - u_k)/step in [0, 1), p(f) = c0 + f (c1 + f (c2 + f c3)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dig_kernels.reference import locate


@dataclass(frozen=True)
class KnotGrid:
    """Uniform knots start, start + step, ... (`knots` of them)."""

    start: float
    stop: float
    knots: int

    @property
    def step(self) -> float:
        """Distance between knots."""
        return (self.stop - self.start) / (self.knots - 1)

    def positions(self, like: Tensor) -> Tensor:
        """Knots [T] on the device and in the dtype of `like`."""
        return torch.linspace(self.start, self.stop, self.knots, device=like.device, dtype=like.dtype)


ChannelsOf = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The exact function: u [N] -> values and slopes d/du, [N, C] each."""

TOLERANCE = 1e-4
"""Largest error of a table in use, relative to the range of the channel: far below bf16 rounding of the same numbers."""
FLAT = 1e-2
"""A channel that varies by less than this part of its size is measured against that part of its size, for rounding."""


@dataclass(frozen=True)
class RadialTable:
    """A table in use: pieces [T-1, 4, C] on the knots of `grid`, and its error relative to the channels' ranges."""

    pieces: Tensor
    grid: KnotGrid
    error: float


@dataclass(frozen=True)
class DirectForm:
    """No table is in use: on these knots it would miss the exact function by `error`, relative to the channels' ranges."""

    grid: KnotGrid
    error: float


def build_table(
    channels_of: ChannelsOf, grid: KnotGrid, like: Tensor, tolerance: float = TOLERANCE
) -> RadialTable | DirectForm:
    """The table of channels_of, or DirectForm where its error exceeds `tolerance`; device and dtype of `like`.

    Pieces are differentiable in what channels_of depends on. The check doubles the cost and waits for the device: build
    once or every so many steps this way, and with hermite_pieces alone in between.
    """
    pieces = hermite_pieces(*channels_of(grid.positions(like)), grid)
    error = table_error(channels_of, pieces, grid)
    return RadialTable(pieces, grid, error) if error <= tolerance else DirectForm(grid, error)


@torch.no_grad()
def table_error(channels_of: ChannelsOf, pieces: Tensor, grid: KnotGrid) -> float:
    """Largest |table - exact| half way between knots, relative to the range of each channel; NaN if a value is."""
    exact, _ = channels_of(grid.positions(pieces)[:-1] + grid.step / 2)
    if not exact.shape[-1]:
        return 0.0
    knots = pieces[:, 0]
    low, high = torch.minimum(exact.amin(0), knots.amin(0)), torch.maximum(exact.amax(0), knots.amax(0))
    scale = torch.maximum(high - low, FLAT * torch.maximum(high.abs(), low.abs()))
    f = torch.full((len(pieces),), 0.5, dtype=pieces.dtype, device=pieces.device)
    gap = (_evaluate(pieces, torch.arange(len(pieces), device=pieces.device), f) - exact).abs().amax(0)
    return float((gap / torch.where(scale > 0, scale, 1.0)).max())


def hermite_pieces(values: Tensor, slopes: Tensor, grid: KnotGrid) -> Tensor:
    """Polynomial coefficients [T-1, 4, C] of the pieces from knot values [T, C] and derivatives df/du [T, C]."""
    v0, v1 = values[:-1], values[1:]
    s0, s1 = slopes[:-1] * grid.step, slopes[1:] * grid.step
    rise = v1 - v0
    return torch.stack([v0, s0, 3 * rise - 2 * s0 - s1, s0 + s1 - 2 * rise], dim=1)


def evaluate_pieces(pieces: Tensor, u: Tensor, grid: KnotGrid) -> Tensor:
    """Channels [..., C] at u [...]; u outside the grid takes the value at its end. Differentiable in `pieces` and `u`."""
    if torch.is_grad_enabled() and (pieces.requires_grad or u.requires_grad):
        return _EvaluatePieces.apply(pieces, u, grid)
    return _evaluate(pieces, *_locate(u, grid))


def _locate(u: Tensor, grid: KnotGrid) -> tuple[Tensor, Tensor]:
    return locate(u, grid.start, grid.step, grid.knots - 1)


def _evaluate(pieces: Tensor, piece: Tensor, fraction: Tensor) -> Tensor:
    """sum_m f^m pieces[k, m]: one gather, weighting and sum per pair, without rows in between."""
    out = _weighted_bags(pieces.flatten(0, 1), _coefficient_rows(piece), _powers(fraction))
    return out.view(*fraction.shape, pieces.shape[-1])


def _weighted_bags(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """sum_m weights[p, m] table[rows[p, m]], [P, C]."""
    offsets = torch.arange(0, rows.numel(), rows.shape[1], device=rows.device)
    flat, weights = rows.reshape(-1), weights.reshape(-1)
    return torch.nn.functional.embedding_bag(flat, table, offsets, mode="sum", per_sample_weights=weights)


def _coefficient_rows(piece: Tensor) -> Tensor:
    """Rows [P, 4] of the four coefficients of each pair's piece."""
    return 4 * piece.reshape(-1, 1) + torch.arange(4, device=piece.device)


def _powers(fraction: Tensor) -> Tensor:
    """1, f, f², f³, [P, 4]."""
    f = fraction.reshape(-1)
    square = f * f
    return torch.stack([torch.ones_like(f), f, square, square * f], dim=-1)


class _EvaluatePieces(torch.autograd.Function):
    """First derivatives by hand (no [P, 4C] graph is kept); second derivatives by re-evaluating with autograd."""

    @staticmethod
    def forward(ctx, pieces: Tensor, u: Tensor, grid: KnotGrid) -> Tensor:  # type: ignore[override, no-untyped-def]
        ctx.save_for_backward(pieces, u)
        ctx.grid = grid
        return _evaluate(pieces, *_locate(u, grid))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override, no-untyped-def]
        pieces, u = ctx.saved_tensors
        needs_pieces, needs_u, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return *_differentiable_backward(pieces, u, grad, ctx.grid), None
        piece, fraction = _locate(u, ctx.grid)
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        grad_pieces = _collect(rows, fraction, piece, len(pieces)) if needs_pieces else None
        grad_u = _pull(rows, pieces, piece, fraction) / ctx.grid.step * _inside(u, ctx.grid) if needs_u else None
        return grad_pieces, grad_u, None


def _pull(grad: Tensor, pieces: Tensor, piece: Tensor, fraction: Tensor) -> Tensor:
    """sum_c grad_c dp_c/df in the shape of `fraction`: dot products with the coefficient rows, then the powers' slopes."""
    rows = _coefficient_rows(piece)
    offsets = torch.arange(0, rows.numel(), 4, device=rows.device)
    bags = torch.arange(len(rows), device=rows.device).repeat_interleave(4)
    table = pieces.flatten(0, 1)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, table, rows.view(-1), offsets, bags, 0)
    _, first, second, third = dots.view(-1, 4).unbind(-1)
    f = fraction.reshape(-1)
    return (first + f * (2 * second + 3 * f * third)).view(fraction.shape)


def _collect(grad: Tensor, fraction: Tensor, piece: Tensor, n_pieces: int) -> Tensor:
    """sum over the pairs of each piece of f^m grad, [K-1, 4, C]: pairs sorted by piece, one bag per (piece, power)."""
    place = piece.reshape(-1)
    order = torch.argsort(place, stable=True)
    counts = torch.bincount(place, minlength=n_pieces)
    starts = 4 * (counts.cumsum(0) - counts)
    powers = torch.arange(4, device=place.device)
    of_pair = place[order]
    rank = torch.arange(len(order), device=place.device) - starts[of_pair] // 4
    slots = starts[of_pair, None] + powers * counts[of_pair, None] + rank[:, None]
    rows, weights = torch.empty_like(slots).view(-1), grad.new_empty(slots.numel())
    rows[slots.view(-1)] = order.repeat_interleave(4)
    weights[slots.view(-1)] = _powers(fraction.reshape(-1)[order]).view(-1)
    offsets = (starts[:, None] + powers * counts[:, None]).view(-1)
    bags = torch.nn.functional.embedding_bag(rows, grad, offsets, mode="sum", per_sample_weights=weights)
    return bags.view(n_pieces, 4, -1)


def _slope(pieces: Tensor, piece: Tensor, f: Tensor) -> Tensor:
    channels = pieces.shape[-1]
    rows = torch.nn.functional.embedding(piece, pieces[:, 1:].reshape(len(pieces), 3 * channels))
    c1, c2, c3 = rows.split(channels, dim=-1)
    return c1 + f * (2 * c2 + 3 * f * c3)


def _inside(u: Tensor, grid: KnotGrid) -> Tensor:
    return (u >= grid.start) & (u <= grid.stop)


def _differentiable_backward(pieces: Tensor, u: Tensor, grad: Tensor, grid: KnotGrid) -> tuple[Tensor, Tensor]:
    """The same gradients written in differentiable operations, for create_graph=True."""
    piece, fraction = _locate(u, grid)
    f = fraction.unsqueeze(-1)
    powers = torch.stack([grad, grad * f, grad * f**2, grad * f**3], dim=-2)
    grad_pieces = torch.zeros_like(pieces).index_add(0, piece.reshape(-1), powers.reshape(-1, *pieces.shape[1:]))
    grad_u = (grad * _slope(pieces, piece, f)).sum(-1) / grid.step * _inside(u, grid)
    return grad_pieces, grad_u
