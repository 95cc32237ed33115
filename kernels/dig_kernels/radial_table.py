"""Tabulated radial channels: C smooth functions of one scalar u per pair, as cubic Hermite pieces on uniform knots.

The pair bias of a Graphormer, MLP(Gaussians(u)), depends on a pair only through the scalar u. So it is evaluated exactly
on T knots and interpolated: the cost is O(T) rows of the MLP instead of O(B L²). Values and first derivatives agree with
the exact function at the knots; the interpolation error is O(step⁴). Knows tensors, not molecules.

Notation: on piece k, with f = (u - u_k)/step in [0, 1), p(f) = c0 + f (c1 + f (c2 + f c3)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    place = ((u - grid.start) / grid.step).clamp(0, grid.knots - 1)
    piece = place.detach().floor().clamp(max=grid.knots - 2)
    return piece.long(), place - piece


def _evaluate(pieces: Tensor, piece: Tensor, fraction: Tensor) -> Tensor:
    channels = pieces.shape[-1]
    rows = torch.nn.functional.embedding(piece, pieces.reshape(len(pieces), 4 * channels))
    c0, c1, c2, c3 = rows.split(channels, dim=-1)
    f = fraction.unsqueeze(-1)
    return torch.addcmul(c0, f, torch.addcmul(c1, f, torch.addcmul(c2, f, c3)))


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
        f = fraction.unsqueeze(-1)
        grad_pieces = _scatter(grad, f, piece, len(pieces)) if needs_pieces else None
        grad_u = (grad * _slope(pieces, piece, f)).sum(-1) / ctx.grid.step * _inside(u, ctx.grid) if needs_u else None
        return grad_pieces, grad_u, None


def _slope(pieces: Tensor, piece: Tensor, f: Tensor) -> Tensor:
    channels = pieces.shape[-1]
    rows = torch.nn.functional.embedding(piece, pieces[:, 1:].reshape(len(pieces), 3 * channels))
    c1, c2, c3 = rows.split(channels, dim=-1)
    return c1 + f * (2 * c2 + 3 * f * c3)


def _inside(u: Tensor, grid: KnotGrid) -> Tensor:
    return (u >= grid.start) & (u <= grid.stop)


def _scatter(grad: Tensor, f: Tensor, piece: Tensor, n_pieces: int) -> Tensor:
    channels = grad.shape[-1]
    powers = grad.new_empty(piece.numel(), 4, channels)
    powers[:, 0] = grad.reshape(-1, channels)
    for k in range(3):
        torch.mul(powers[:, k], f.reshape(-1, 1), out=powers[:, k + 1])
    flat = torch.ops.aten.embedding_dense_backward(powers.flatten(1), piece.reshape(-1), n_pieces, -1, False)
    return flat.view(n_pieces, 4, channels)


def _differentiable_backward(pieces: Tensor, u: Tensor, grad: Tensor, grid: KnotGrid) -> tuple[Tensor, Tensor]:
    """The same gradients written in differentiable operations, for create_graph=True."""
    piece, fraction = _locate(u, grid)
    f = fraction.unsqueeze(-1)
    powers = torch.stack([grad, grad * f, grad * f**2, grad * f**3], dim=-2)
    grad_pieces = torch.zeros_like(pieces).index_add(0, piece.reshape(-1), powers.reshape(-1, *pieces.shape[1:]))
    grad_u = (grad * _slope(pieces, piece, f)).sum(-1) / grid.step * _inside(u, grid)
    return grad_pieces, grad_u
