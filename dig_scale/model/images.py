"""Pair operators of periodic systems: every image within the cutoff is seen, and folded into one value per pair of sites.

Attention over images of one key differs between them only in the bias, so that softmax over all of them is softmax over
keys with the log-sum-exp of their biases; likewise sums over images of a filter times its direction are made once and
serve all blocks. A smooth envelope takes images out at the cutoff; a site always sees itself, and its own images as
sites of other molecules, so that a crystal and its supercells are the same.
"""

from __future__ import annotations

import math

import torch
from dig_kernels.dispatch import Backend, backend_for, wants_reference
from torch import Tensor

from dig_scale.batch import Context, Geometry
from dig_scale.geometry.lattice import Edges, fractional, periodic_edges, symmetric_coordinates
from dig_scale.model.pair_bias import PairBias, pair_list
from dig_scale.model.pair_operators import ImageOperators
from dig_scale.model.select import MASKED, PairWidths

MIN_IMAGE_DISTANCE = 0.1
"""Å; distances are kept above it where noise brings atoms together."""
STEEPEST = 20.0
"""Largest |bias| of an image, so that its exponential stays finite in single precision."""


def image_geometry(
    pair_bias: PairBias, widths: PairWidths, seen: Geometry, context: Context, cutoff: float
) -> tuple[ImageOperators, Tensor]:
    """Operators of a batch with cells [B, 3, 3] Å, and its node feature [B, N, M]."""
    assert seen.cell is not None
    batch, n = seen.positions.shape[:2]
    periodic = tuple(bool(value) for value in context.periodic[0])
    coordinates = fractional(seen.positions, seen.cell)
    edges = periodic_edges(coordinates, seen.cell, context.present.expand(batch, n), cutoff, periodic)  # type: ignore[arg-type]
    distance = torch.sqrt(edges.distances**2 + MIN_IMAGE_DISTANCE**2)
    elements = context.element.expand(batch, n)
    u = pair_bias.image_scalar(distance, elements[edges.sample, edges.i], elements[edges.sample, edges.j])
    envelope = 0.5 * (1 + torch.cos(math.pi * edges.distances / cutoff)).unsqueeze(-1)
    bias, filters, node = pair_bias.channels(u).split([widths.heads, widths.filters, widths.node], dim=-1)
    pairs = pair_list(n, seen.positions.device)
    static = pair_bias.dense_static(pairs, context, widths.heads)
    bias = torch.where((edges.i == edges.j).unsqueeze(-1), bias + pair_bias.unlinked()[: widths.heads], bias)
    weights = filters * envelope / distance.unsqueeze(-1)
    row = edges.sample * n + edges.i
    at_sites = lambda values: values.new_zeros(batch * n, *values.shape[1:]).index_add(0, row, values)  # noqa: E731
    arms = (weights.unsqueeze(-1) * -edges.vectors.unsqueeze(1)).flatten(1)
    return (
        ImageOperators(
            _fold(bias, envelope, edges, (batch, n))
            .add(static)
            .masked_fill(~context.present[:, None, None, :], MASKED),
            _scatter(weights, edges, (batch, n)).permute(0, 3, 1, 2),
            _scatter(arms, edges, (batch, n)).unflatten(-1, (-1, 3)).permute(0, 3, 4, 1, 2).flatten(2, 3),
            at_sites(_outer(weights, edges, distance)).view(batch, n, -1, 6),
            dense=backend_for(seen.positions) is Backend.CPU and not wants_reference("score_model", seen.positions),
        ),
        at_sites(node * envelope).view(batch, n, -1),
    )


def _outer(weights: Tensor, edges: Edges, distance: Tensor) -> Tensor:
    """w u uᵀ [E, M, 6] of directions u, in the symmetric coordinates of geometry.lattice."""
    along = edges.vectors / distance.unsqueeze(-1)
    return weights.unsqueeze(-1) * symmetric_coordinates(along.unsqueeze(-1) * along.unsqueeze(-2)).unsqueeze(1)


def _fold(bias: Tensor, envelope: Tensor, edges: Edges, shape: tuple[int, int]) -> Tensor:
    """log sum over images exp(bias) envelope [B, H, N, N]; the site itself counts as one image of bias 0."""
    total = _scatter(torch.exp(bias.clamp(-STEEPEST, STEEPEST)) * envelope, edges, shape).permute(0, 3, 1, 2)
    total = total + torch.eye(shape[1], dtype=total.dtype, device=total.device)
    reached = total > 0
    return torch.where(reached, torch.log(torch.where(reached, total, 1.0)), MASKED)


def _scatter(values: Tensor, edges: Edges, shape: tuple[int, int]) -> Tensor:
    """Sums over images [B, N, N, C] of values [E, C]."""
    batch, n = shape
    row = (edges.sample * n + edges.i) * n + edges.j
    return values.new_zeros(batch * n * n, values.shape[-1]).index_add(0, row, values).view(batch, n, n, -1)
