"""Pair geometry and static pair encodings -> radial channels for every pair of sites.

Every pair carries one scalar u: gain · z + shift + origin(segment), where z measures the distance on the scale that
matters. For pairs one and two bonds apart (bonds, angles) z is the departure from the reference distance in units of the
noise, z = asinh((d - d_ref)/sqrt(w0² + noise²)); for all others z is the distance shrunk to the extent of the clean
molecule. gain and shift depend on the two elements, as in DiG. Segments (path length 1, 2, 3, more) lie apart on the
u axis, so that one function of one scalar serves all: MLP(Gaussians(u)), tabulated by dig_kernels.radial_table; the
direct form, evaluated for every pair, is its oracle (`radial_knots = 0`). Blind to schedules: it is told noise_std.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from dig_kernels.radial_table import KnotGrid, evaluate_pieces, hermite_pieces
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from dig_scale.batch import Context
from dig_scale.config import Model
from dig_scale.model.leaves import NormalEmbedding

RELATIVE_WIDTH = 0.03
"""w0 in Å: thermal width of a bond length, the finest resolution asked for."""
RELATIVE_REACH = 5.5
"""|z| at the ends of a relative segment."""
DISTANCE_SCALE = 4.0
"""Å; distances well beyond it are compressed logarithmically."""
DISTANCE_REACH = 14.0
ELEMENTS = 120
BOND_ORDERS = 6

_ORIGINS = (
    0.0,
    RELATIVE_REACH,
    3 * RELATIVE_REACH + 1,
    4 * RELATIVE_REACH + 2,
    4 * RELATIVE_REACH + DISTANCE_REACH + 3,
)
"""u at z = 0 by segment: 0 (self, unused), 1 and 2 (relative), 3 and 4 (distances)."""
U_STOP = _ORIGINS[4] + DISTANCE_REACH


@dataclass(frozen=True)
class PairList:
    """Every unordered pair of N sites once: first, second [P], and `expand` [N*N] from (i, j) to its pair; the diagonal is P."""

    first: Tensor
    second: Tensor
    expand: Tensor


def pair_list(n_sites: int, device: torch.device) -> PairList:
    """The pairs i < j of n_sites sites."""
    first, second = torch.triu_indices(n_sites, n_sites, offset=1, device=device)
    count = len(first)
    expand = torch.full((n_sites, n_sites), count, device=device)
    expand[first, second] = torch.arange(count, device=device)
    expand[second, first] = torch.arange(count, device=device)
    return PairList(first, second, expand.reshape(-1))


def noise_scale(noise_std: Tensor, extent: Tensor) -> Tensor:
    """Factor [B] that brings noised coordinates back to the extent (Å) of the clean molecule."""
    return extent * torch.rsqrt(extent**2 + noise_std**2)


class RadialChannels(nn.Module):
    """u [...] -> C channels and their derivative: Gaussians with learnable centres and widths, then a two-layer MLP.

    One leaf that owns all its parameters, so that it is gathered as one under ZeRO-3.
    """

    def __init__(self, kernels: int, channels: int) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.linspace(0, U_STOP, kernels))
        self.log_width = nn.Parameter(torch.full((kernels,), math.log(U_STOP / kernels)))
        self.hidden_weight = nn.Parameter(torch.randn(kernels, kernels) * (4 / kernels) ** 0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(kernels))
        self.out_weight = nn.Parameter(torch.randn(channels, kernels) * kernels**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(channels))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Values and exact slopes d/du, [..., C] each, both differentiable in the parameters."""
        inverse = torch.exp(-self.log_width)
        offset = (u.unsqueeze(-1) - self.centre) * inverse
        gauss = torch.exp(-0.5 * offset**2)
        hidden = linear(gauss, self.hidden_weight, self.hidden_bias)
        hidden_slope = linear(-offset * inverse * gauss, self.hidden_weight)
        gate = 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # GELU(h) = h gate(h)
        gelu_slope = gate + hidden * torch.exp(-0.5 * hidden**2) / math.sqrt(2 * math.pi)
        value = linear(hidden * gate, self.out_weight, self.out_bias)
        return value, linear(gelu_slope * hidden_slope, self.out_weight)


class PairBias(nn.Module):
    """Geometry and static encodings of all pairs as `channels` numbers per ordered pair, [B, C, N, N] (0 on the diagonal)."""

    def __init__(self, config: Model, channels: int) -> None:
        super().__init__()
        self.grid = KnotGrid(0.0, U_STOP, config.radial_knots) if config.radial_knots else None
        self.max_path = config.max_path_length
        self.radial = RadialChannels(config.radial_kernels, channels)
        self.gain = NormalEmbedding(ELEMENTS * ELEMENTS, 1, mean=1.0, std=0.0)
        self.shift = NormalEmbedding(ELEMENTS * ELEMENTS, 1, std=0.0)
        self.path = NormalEmbedding(self.max_path + 2, channels, std=0.1)
        self.bond = NormalEmbedding(BOND_ORDERS, channels, std=0.1)

    def forward(self, distance: Tensor, pairs: PairList, context: Context, noise_std: Tensor) -> Tensor:
        """Channels [B, C, N, N] from pair distances [B, P] in Å and noise_std [B] in Å."""
        u = self.scalar(distance, pairs, context, noise_std)
        radial = self._tabulated(u) if self.grid else self.radial(u)[0]
        both = radial + self._static(pairs, context)
        padded = pad(both.transpose(1, 2), (0, 1))
        n = context.n_sites
        return padded.index_select(2, pairs.expand).view(len(distance), -1, n, n)

    def scalar(self, distance: Tensor, pairs: PairList, context: Context, noise_std: Tensor) -> Tensor:
        """u [B, P] of every pair."""
        at_pairs = lambda field: field[:, pairs.first, pairs.second]  # noqa: E731
        segment, reference = at_pairs(context.pair_segment), at_pairs(context.pair_reference)
        width = torch.sqrt(RELATIVE_WIDTH**2 + noise_std**2).unsqueeze(1)
        relative = torch.asinh((distance - reference) / width).clamp(-RELATIVE_REACH, RELATIVE_REACH)
        shrunk = distance * noise_scale(noise_std, context.extent).unsqueeze(1)
        absolute = (DISTANCE_SCALE * torch.asinh(shrunk / DISTANCE_SCALE)).clamp(max=DISTANCE_REACH)
        z = torch.where(segment <= 2, relative, absolute)
        code = self._element_code(context, pairs)
        origin = distance.new_tensor(_ORIGINS)[segment]
        return self.gain(code).squeeze(-1) * z + self.shift(code).squeeze(-1) + origin

    def _element_code(self, context: Context, pairs: PairList) -> Tensor:
        a, b = context.element[:, pairs.first], context.element[:, pairs.second]
        return torch.minimum(a, b) * ELEMENTS + torch.maximum(a, b)

    def _static(self, pairs: PairList, context: Context) -> Tensor:
        length = context.path_length[:, pairs.first, pairs.second].clamp(max=self.max_path + 1)
        return self.path(length) + self.bond(context.bond_order[:, pairs.first, pairs.second])

    def _tabulated(self, u: Tensor) -> Tensor:
        assert self.grid is not None
        values, slopes = self.radial(self.grid.positions(u))
        return evaluate_pieces(hermite_pieces(values, slopes, self.grid), u, self.grid)
