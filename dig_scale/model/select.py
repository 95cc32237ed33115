"""Which implementation of the pair operators a batch uses: reference, fast form for processors, or fused kernels.

The parameters are the same for all, so a checkpoint trained with one runs with any other. Derivatives that the fast
forms lack (forward mode, functorch transforms) select the reference by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from dig_kernels.dispatch import Backend, backend_for, wants_reference
from torch import Tensor
from torch.nn.functional import pad

from dig_scale.batch import Context
from dig_scale.model.pair_bias import PairBias, PairDistances, PairList, noise_scale, pair_list
from dig_scale.model.pair_operators import DenseOperators, PairOperators, ReferenceOperators

MASKED = -1e4
"""Attention bias of absent keys."""
MIN_DISTANCE = 1e-2
"""Å; keeps pair directions finite where sites coincide."""


@dataclass(frozen=True)
class PairWidths:
    """How the channels of a pair are used (attention heads, filters, summed node features), and what attends with them.

    `attention_dtype` is that of q, k, v and the bias in fused attention; distances, tables and filters do not follow it.
    """

    heads: int
    filters: int
    node: int
    layers: int
    head_width: int
    attention_dtype: torch.dtype


Build = Callable[[PairBias, PairWidths, Tensor, Context, Tensor], tuple[PairOperators, Tensor]]
"""(pair bias, widths, positions [B,N,3] Å, context, noise_std [B] Å) -> operators, node feature [B, N, M]."""


def attention_dtype(positions: Tensor) -> torch.dtype:
    """The dtype of attention: autocast's where it is on, else that of the positions."""
    device = positions.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else positions.dtype


def geometry_builder(kernels: Literal["auto", "reference", "triton"], positions: Tensor) -> Build:
    """The implementation that a recipe asks for, or the best for the device of these positions."""
    if kernels == "reference" or wants_reference("score_model", positions):
        return _reference
    if kernels == "triton" or backend_for(positions) is Backend.TRITON:
        from dig_scale.model.fused_operators import fused_geometry  # needs Triton

        return fused_geometry
    return _dense if backend_for(positions) is Backend.CPU else _reference


def pair_distances(positions: Tensor, context: Context, noise_std: Tensor) -> PairDistances:
    """Distances of all pairs and sites [B, N, 3] brought back towards their anchors, to the scale of clean structures."""
    pairs = pair_list(positions.shape[1], positions.device)
    sites = clean_scale(positions, context, noise_std)
    return PairDistances(pairs, _lengths(positions, pairs), _lengths(sites, pairs), sites)


def clean_scale(positions: Tensor, context: Context, noise_std: Tensor) -> Tensor:
    """Positions [B, N, 3] Å with the displacements from their anchors at the scale of clean structures; fixed sites stay."""
    factor = noise_scale(noise_std, context.extent).masked_fill(~context.mobile, 1.0)
    return context.anchor + (positions - context.anchor) * factor.unsqueeze(-1)


def _lengths(positions: Tensor, pairs: PairList) -> Tensor:
    offset = positions[:, pairs.first] - positions[:, pairs.second]
    return torch.sqrt((offset**2).sum(-1) + MIN_DISTANCE**2)


def inverse_distances(found: PairDistances, absent: Tensor) -> Tensor:
    """1/d [B, 1, N, N] in 1/Å of the shrunk molecule, 0 on the diagonal and for absent keys."""
    n = found.sites.shape[1]
    inverse = pad(torch.reciprocal(found.shrunk), (0, 1))[:, found.pairs.expand]
    return inverse.view(len(inverse), 1, n, n).masked_fill(absent, 0.0)


def _dense(
    pair_bias: PairBias, widths: PairWidths, positions: Tensor, context: Context, noise_std: Tensor
) -> tuple[PairOperators, Tensor]:
    found = pair_distances(positions, context, noise_std)
    channels = pair_bias(found, context, noise_std)
    bias, filters, node = _split(channels, found, widths, context)
    return DenseOperators(bias, filters, found.sites), node


def _reference(
    pair_bias: PairBias, widths: PairWidths, positions: Tensor, context: Context, noise_std: Tensor
) -> tuple[PairOperators, Tensor]:
    found = pair_distances(positions, context, noise_std)
    channels = pair_bias.direct(found, context, noise_std)
    bias, filters, node = _split(channels, found, widths, context)
    return ReferenceOperators(bias, filters, found.sites), node


def _split(
    channels: Tensor, found: PairDistances, widths: PairWidths, context: Context
) -> tuple[Tensor, Tensor, Tensor]:
    """Bias [B,H,N,N], filters over distance [B,M,N,N] in 1/Å, node feature [B,N,M]."""
    bias, filters, node = channels.split([widths.heads, widths.filters, widths.node], dim=1)
    absent = ~context.present[:, None, None, :]
    summed = node.masked_fill(absent, 0.0).sum(-1).transpose(1, 2)
    return bias.masked_fill(absent, MASKED), filters * inverse_distances(found, absent), summed
