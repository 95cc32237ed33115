"""Unit cells: fractional coordinates, minimum images, neighbours through the walls, and a cell as six plain numbers.

A cell [..., 3, 3] holds its lattice vectors in rows, Å, so Cartesian = fractional @ cell; its determinant is positive.
Cells that differ by a rotation are one: `cell_to_symmetric` picks the symmetric positive definite one among them (polar
decomposition), and `log_cell` is the matrix logarithm of that one in an orthonormal basis of symmetric matrices, so that
Euclidean distance between coordinates is Frobenius distance between logarithms. The first coordinate is isotropic
(log volume / sqrt 3), the other five are shape. Torch, batched and differentiable; `niggli_reduced` alone is numpy
(spglib). Knows no elements, no noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dig_scale.errors import UserError

ALL_DIRECTIONS = (True, True, True)
_CANDIDATES_AT_ONCE = 2**21
"""Pairs times images looked at in one go by periodic_edges: about 100 MB."""
_NIGGLI_PRECISION = 1e-5


def cartesian(fractional: Float[Tensor, "*b N 3"], cell: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b N 3"]:
    """Positions in Å of fractional coordinates."""
    return fractional @ cell


def fractional(positions: Float[Tensor, "*b N 3"], cell: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b N 3"]:
    """Fractional coordinates of positions in Å, as they are: not wrapped."""
    return torch.linalg.solve(cell, positions, left=False)


def wrap(coordinates: Tensor) -> Tensor:
    """Fractional coordinates in [0, 1), same shape; gradients pass as through the identity."""
    wrapped = coordinates - torch.floor(coordinates.detach())
    # -1e-9 + 1 rounds to 1 in single precision
    return torch.where(wrapped >= 1, wrapped - 1, wrapped)


def heights(cell: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3"]:
    """Distances in Å between opposite walls of a cell."""
    return 1 / torch.linalg.vector_norm(torch.linalg.inv(cell), dim=-2)


def image_shifts(
    cell: Float[Tensor, "*b 3 3"], cutoff: float, periodic: tuple[bool, bool, bool] = ALL_DIRECTIONS
) -> Int[Tensor, "I 3"]:
    """Lattice translations that reach every image within `cutoff` Å of any site, for fractional coordinates in [0, 1).

    One list serves all cells of the batch; it is closed under negation and holds zero. |f_j + s - f_i| h < cutoff with
    both f in [0, 1) leaves |s| <= ceil(cutoff/h) along a direction of height h.
    """
    reach = torch.ceil(cutoff / heights(cell.detach().double())).reshape(-1, 3).amax(0).long().tolist()
    ranges = [
        torch.arange(-n, n + 1) if open_ else torch.zeros(1, dtype=torch.long)
        for n, open_ in zip(reach, periodic, strict=True)
    ]
    return torch.cartesian_prod(*ranges).to(cell.device)


def minimum_image(
    vectors: Float[Tensor, "*b M 3"], cell: Float[Tensor, "*b 3 3"], periodic: tuple[bool, bool, bool] = ALL_DIRECTIONS
) -> Float[Tensor, "*b M 3"]:
    """The shortest of all periodic images of vectors in Å; exact for skewed cells too."""
    steps = fractional(vectors, cell)
    open_ = torch.tensor(periodic, device=vectors.device)
    near = torch.where(open_, steps - torch.round(steps.detach()), steps)
    start = cartesian(near, cell)
    longest = float(torch.linalg.vector_norm(start.detach(), dim=-1).max()) if start.numel() else 0.0
    # a shorter image than the start has |f + s| h < its length; with |f| <= 1/2, image_shifts covers it
    images = image_shifts(cell, longest, periodic).to(vectors.dtype)
    candidates = start.unsqueeze(-2) + cartesian(images.expand(*cell.shape[:-2], -1, -1), cell).unsqueeze(-3)
    best = torch.linalg.vector_norm(candidates.detach(), dim=-1).argmin(-1)
    return torch.take_along_dim(candidates, best[..., None, None], dim=-2).squeeze(-2)


def softly_folded(
    offsets: Float[Tensor, "B N 3"],
    group: Bool[Tensor, "B N"],
    cell: Float[Tensor, "B 3 3"],
    periodic: tuple[bool, bool, bool],
    width: float,
    place: Float[Tensor, " B"],
) -> Float[Tensor, "B N 3"]:
    """Offsets in Å with the sites of a group moved as one by a lattice translation, so that they lie near 0.

    Image L is taken with probability proportional to exp(-|mean offset + L|²/(2 width²)), by `place` uniform in [0, 1): so
    a density that is periodic becomes one in space without an edge anywhere, as cutting at the cell's wall would make.
    """
    count = group.sum(1).clamp(min=1).unsqueeze(-1)
    mean = (offsets * group.unsqueeze(-1)).sum(1) / count
    home = minimum_image(mean.unsqueeze(1), cell, periodic).squeeze(1)
    shifts = image_shifts(cell, 4 * width, periodic).to(cell.dtype)
    images = home.unsqueeze(1) + cartesian(shifts.expand(len(cell), -1, -1), cell)
    chances = torch.softmax(-(images**2).sum(-1) / (2 * width**2), dim=1)
    chosen = torch.searchsorted(chances.cumsum(1), place.to(cell.dtype).unsqueeze(1)).clamp(max=len(shifts) - 1)
    moved = torch.take_along_dim(images, chosen.unsqueeze(-1), dim=1).squeeze(1) - mean
    return offsets + group.unsqueeze(-1) * moved.unsqueeze(1)


@dataclass(frozen=True)
class Edges:
    """Ordered pairs of a site and an image of a site, sorted by sample, i, j: sample, i, j [E]; shift [E, 3] cells added to
    the fractional coordinates of j as they were given; vectors [E, 3] Å from i to the image of j; distances [E] Å.
    """

    sample: Int[Tensor, " E"]
    i: Int[Tensor, " E"]
    j: Int[Tensor, " E"]
    shift: Int[Tensor, "E 3"]
    vectors: Float[Tensor, "E 3"]
    distances: Float[Tensor, " E"]


def periodic_edges(
    coordinates: Float[Tensor, "B N 3"],
    cell: Float[Tensor, "B 3 3"],
    present: Bool[Tensor, "B N"],
    cutoff: float,
    periodic: tuple[bool, bool, bool] = ALL_DIRECTIONS,
) -> Edges:
    """All ordered pairs closer than `cutoff` Å, images of a site about itself included, a site with itself excluded.

    Takes any fractional coordinates, wrapped or not. Vectors and distances are differentiable in coordinates and cell.
    """
    with torch.no_grad():
        pairs = _pairs(coordinates, cell, present, cutoff, periodic)
        pieces = [_near(pairs, cell, cutoff, first) for first in range(0, max(1, len(pairs.sample)), pairs.per_piece)]
        pair, shift = (torch.cat(column) for column in zip(*pieces, strict=True))
        sample, i, j = (_rows(column, pair) for column in (pairs.sample, pairs.i, pairs.j))
    sites, n = coordinates.flatten(0, 1), coordinates.shape[1]
    across = _rows(sites, sample * n + j) - _rows(sites, sample * n + i) + shift
    vectors = torch.einsum("ek,ekx->ex", across, _rows(cell, sample))
    return Edges(sample, i, j, shift.long(), vectors, torch.linalg.vector_norm(vectors, dim=-1))


@dataclass(frozen=True)
class _Pairs:
    """Ordered pairs [P] of present sites, and for each the box of shifts that can bring j within reach of i: `lowest` and
    `count` [P, 3] along the cell's vectors."""

    sample: Tensor
    i: Tensor
    j: Tensor
    across: Tensor
    lowest: Tensor
    count: Tensor

    @property
    def per_piece(self) -> int:
        """Pairs to look at in one go."""
        largest = int(self.count.prod(1).max()) if len(self.count) else 1
        return max(1, _CANDIDATES_AT_ONCE // max(1, largest))


def _pairs(
    coordinates: Tensor, cell: Tensor, present: Tensor, cutoff: float, periodic: tuple[bool, bool, bool]
) -> _Pairs:
    sample, i, j = (present.unsqueeze(2) & present.unsqueeze(1)).nonzero(as_tuple=True)
    across = coordinates[sample, j] - coordinates[sample, i]
    # |across + s| h < cutoff along each direction of height h; the margin is for rounding
    reach = (cutoff / heights(cell) * (1 + 1e-5))[sample]
    lowest, highest = torch.ceil(-reach - across), torch.floor(reach - across)
    open_ = torch.tensor(periodic, device=cell.device)
    lowest = torch.where(open_, lowest, torch.zeros_like(lowest))
    count = torch.where(open_, (highest - lowest + 1).clamp(min=0), torch.ones_like(lowest)).long()
    return _Pairs(sample, i, j, across, lowest, count)


def _near(pairs: _Pairs, cell: Tensor, cutoff: float, first: int) -> tuple[Tensor, Tensor]:
    """(pair [E], shift [E, 3]) of the images within the cutoff, for one piece of the pairs."""
    piece = slice(first, first + pairs.per_piece)
    count = pairs.count[piece]
    images = count.prod(1)
    pair = torch.repeat_interleave(images)
    place = torch.arange(len(pair), device=cell.device) - _rows(torch.cumsum(images, 0) - images, pair)
    _, columns, layers = _rows(count, pair).unbind(-1)
    layer = columns * layers
    digits = torch.stack([place // layer, place % layer // layers, place % layers], dim=-1)
    shift = _rows(pairs.lowest[piece], pair) + digits
    start = torch.einsum("ek,ekx->ex", pairs.across[piece], cell[pairs.sample[piece]])
    vectors = _rows(start, pair)
    for k in range(3):
        vectors = vectors + shift[:, k : k + 1] * _rows(cell[:, k], _rows(pairs.sample[piece], pair))
    itself = _rows(pairs.i[piece] == pairs.j[piece], pair) & (shift == 0).all(-1)
    near = (((vectors * vectors).sum(-1) < cutoff**2) & ~itself).nonzero().squeeze(1)
    return _rows(pair, near) + first, _rows(shift, near)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    # several times faster than values[index] on a processor
    return torch.index_select(values, 0, index)


def niggli_reduced(cell: np.ndarray) -> np.ndarray:
    """The Niggli-reduced cell [3, 3] Å of the same lattice, of positive determinant; atoms keep their places in Å.

    Raises UserError for vectors that span no volume or that the reduction does not manage.
    """
    import spglib

    rows = np.asarray(cell, np.float64)
    if not np.isfinite(rows).all() or abs(np.linalg.det(rows)) < np.finfo(np.float64).eps:
        raise UserError(f"cell {rows.tolist()} Å spans no volume; expected three independent vectors")
    # -a, -b, -c span the same lattice with the other handedness
    reduced = spglib.niggli_reduce(rows * np.sign(np.linalg.det(rows)), eps=_NIGGLI_PRECISION)
    if reduced is None:
        raise UserError(f"cell {rows.tolist()} Å has no Niggli reduction at a precision of {_NIGGLI_PRECISION:g}")
    return np.asarray(reduced, np.float64) * np.sign(np.linalg.det(reduced))


def rotation_to_symmetric(cell: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3 3"]:
    """The rotation R for which cell @ R is symmetric positive definite; positions [N, 3] follow as positions @ R."""
    u, _, vh = torch.linalg.svd(cell)
    return (u @ vh).mT


def cell_to_symmetric(cell: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3 3"]:
    """The symmetric positive definite cell that differs from `cell` by a rotation."""
    u, edges, _ = torch.linalg.svd(cell)
    return (u * edges.unsqueeze(-2)) @ u.mT


def log_cell(cell: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 6"]:
    """Coordinates of log sqrt(cell cellᵀ): the matrix logarithm of the symmetric form; the same for rotated cells.

    Differentiable to all orders, equal edges included. Inside in double precision; NaN for a cell without volume.
    """
    wide = cell.double()
    return (0.5 * _SymmetricLog.apply(symmetric_coordinates(wide @ wide.mT))).to(cell.dtype)


def cell_from_log(coordinates: Float[Tensor, "*b 6"]) -> Float[Tensor, "*b 3 3"]:
    """The symmetric cell [..., 3, 3] Å of coordinates: inverse of log_cell; differentiable to all orders."""
    cell = torch.linalg.matrix_exp(symmetric_matrix(coordinates.double()))
    return (0.5 * (cell + cell.mT)).to(coordinates.dtype)


def symmetric_coordinates(matrix: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 6"]:
    """Coordinates of a symmetric matrix in the orthonormal basis: isotropic first, then shape."""
    return torch.einsum("...xy,kxy->...k", matrix, _basis(matrix))


def symmetric_matrix(coordinates: Float[Tensor, "*b 6"]) -> Float[Tensor, "*b 3 3"]:
    """Inverse of symmetric_coordinates."""
    return torch.einsum("...k,kxy->...xy", coordinates, _basis(coordinates))


def _basis(like: Tensor) -> Tensor:
    a, b, c = 1 / math.sqrt(3), 1 / math.sqrt(2), 1 / math.sqrt(6)
    matrices = [
        [[a, 0, 0], [0, a, 0], [0, 0, a]],
        [[b, 0, 0], [0, -b, 0], [0, 0, 0]],
        [[-c, 0, 0], [0, -c, 0], [0, 0, 2 * c]],
        [[0, 0, 0], [0, 0, b], [0, b, 0]],
        [[0, 0, b], [0, 0, 0], [b, 0, 0]],
        [[0, b, 0], [b, 0, 0], [0, 0, 0]],
    ]
    return torch.tensor(matrices, dtype=like.dtype, device=like.device)


class _SymmetricLog(torch.autograd.Function):
    """Matrix logarithm between symmetric coordinates [..., 6].

    Differences of eigenvalues never divide: the derivative is the inverse of that of the exponential at the result,
    which in these coordinates is a symmetric 6 x 6 matrix.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(symmetric_matrix(matrix))
        return symmetric_coordinates((vectors * torch.log(values).unsqueeze(-2)) @ vectors.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _over_exponential(_SymmetricLog.apply(ctx.saved_tensors[0]), gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _over_exponential(_SymmetricLog.apply(ctx.saved_tensors[0]), tangent)


def _over_exponential(logarithm: Tensor, vector: Tensor) -> Tensor:
    """Solution [..., 6] of d exp(logarithm)[solution] = vector: columns from exp [[X, E], [0, X]] (Mathias 1996)."""
    x = symmetric_matrix(logarithm).unsqueeze(-3).expand(*logarithm.shape[:-1], 6, 3, 3)
    directions = _basis(logarithm).expand_as(x)
    block = torch.cat([torch.cat([x, directions], -1), torch.cat([torch.zeros_like(x), x], -1)], -2)
    derivative = symmetric_coordinates(torch.linalg.matrix_exp(block)[..., :3, 3:])
    return torch.linalg.solve(derivative, vector.unsqueeze(-1)).squeeze(-1)
