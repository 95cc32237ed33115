"""Pair geometry and static pair encodings -> radial channels for every pair of sites.

Every pair carries one scalar u: gain · z + shift + origin(segment), where z measures the distance on the scale that
matters. For pairs one and two bonds apart (bonds, angles) z is the departure from the reference distance in units of the
noise, z = asinh((d - d_ref)/sqrt(w0² + noise²)); for all others z is the distance shrunk to the extent of the clean
molecule. gain and shift depend on the two elements, as in DiG. Segments (path length 1, 2, 3, more) lie apart on the
u axis, so that one function of one scalar serves all: MLP(Gaussians(u)), tabulated by dig_kernels.radial_table; the
direct form, evaluated for every pair, is its oracle (`radial_knots = 0`), and takes over where a table would be too
coarse. Blind to schedules: it is told noise_std.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal

import torch
from dig_kernels.radial_table import DirectForm, KnotGrid, build_table, evaluate_pieces, hermite_pieces
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, pad

from dig_scale.batch import Context
from dig_scale.config import Model
from dig_scale.model.leaves import FeatureReader, NormalEmbedding, SmallLinear

logger = logging.getLogger("dig_scale")

RELATIVE_WIDTH = 0.03
"""w0 in Å: thermal width of a bond length, the finest resolution asked for."""
RELATIVE_REACH = 5.5
"""|z| at the ends of a relative segment."""
DISTANCE_SCALE = 4.0
"""Å; distances well beyond it are compressed logarithmically."""
DISTANCE_REACH = 14.0
ELEMENTS = 120
BOND_ORDERS = 8

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


@dataclass(frozen=True)
class PairDistances:
    """Distances [B, P] in Å of the pairs i < j, the same with sites brought back to their clean extent, and those sites."""

    pairs: PairList
    distance: Tensor
    shrunk: Tensor
    sites: Tensor


def noise_scale(noise_std: Tensor, extent: Tensor) -> Tensor:
    """Factors [B, N] that bring noised displacements back to the extents [b, N] (Å) of clean sites; 0 where that is 0."""
    return extent * torch.rsqrt(extent**2 + noise_std.unsqueeze(-1) ** 2)


def compressed(distance: Tensor) -> Tensor:
    """Distances in Å on a scale that is linear to DISTANCE_SCALE and logarithmic beyond."""
    return (DISTANCE_SCALE * torch.asinh(distance / DISTANCE_SCALE)).clamp(max=DISTANCE_REACH)


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

    def forward(self, u: Tensor, derivatives: Literal[0, 1] = 0) -> tuple[Tensor, ...]:
        """Values and, where asked, exact slopes d/du, [..., C] each, both differentiable in the parameters."""
        inverse = torch.exp(-self.log_width)
        offset = (u.unsqueeze(-1) - self.centre) * inverse
        gauss = torch.exp(-0.5 * offset**2)
        hidden = linear(gauss, self.hidden_weight, self.hidden_bias)
        value = linear(gelu(hidden), self.out_weight, self.out_bias)
        if derivatives == 0:
            return (value,)
        hidden_slope = linear(-offset * inverse * gauss, self.hidden_weight)
        gelu_slope = 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        gelu_slope = gelu_slope + hidden * torch.exp(-0.5 * hidden**2) / math.sqrt(2 * math.pi)
        return value, linear(gelu_slope * hidden_slope, self.out_weight)


class PairBias(nn.Module):
    """Geometry and static encodings of all pairs as `channels` numbers per pair: radial(u) + path + bond; and, where the
    model reads some, the features of another network, which need not be the same for (i, j) and (j, i)."""

    def __init__(self, config: Model, channels: int) -> None:
        super().__init__()
        self.grid = KnotGrid(0.0, U_STOP, config.radial_knots) if config.radial_knots else None
        self.max_path = config.max_path_length
        self.radial = RadialChannels(config.radial_kernels, channels)
        self.gain = NormalEmbedding(ELEMENTS * ELEMENTS, 1, mean=1.0, std=0.0)
        self.shift = NormalEmbedding(ELEMENTS * ELEMENTS, 1, std=0.0)
        self.path = NormalEmbedding(self.max_path + 2, channels, std=0.1)
        self.bond = NormalEmbedding(BOND_ORDERS, channels, std=0.1)
        count = config.pair_features
        self.features = FeatureReader(count, SmallLinear(count, channels)) if count else None

    def forward(self, found: PairDistances, context: Context, noise_std: Tensor) -> Tensor:
        """Channels [B, C, N, N], 0 on the diagonal, from the distances of pairs and noise_std [B] in Å.

        Every pair i < j is evaluated once, from the table unless `radial_knots` is 0.
        """
        radial = self.channels(self.scalar(found, context, noise_std))
        if self.features is not None:
            return spread(radial, found.pairs) + self.dense_static(found.pairs, context)
        return spread(radial + self.static(found.pairs, context), found.pairs)

    def channels(self, u: Tensor) -> Tensor:
        """Radial channels [..., C] at u [...]: from the table, or the exact function where there is none."""
        return evaluate_pieces(self.pieces(), u, self.grid) if self.grid else self.radial(u)[0]

    def direct(self, found: PairDistances, context: Context, noise_std: Tensor) -> Tensor:
        """The same [B, C, N, N] from the formula: Gaussians and MLP for every ordered pair. The oracle."""
        pairs = found.pairs
        u = spread(self.scalar(found, context, noise_std).unsqueeze(-1), pairs).squeeze(1)
        both = self.radial(u)[0].permute(0, 3, 1, 2) + self.dense_static(pairs, context)
        apart = ~torch.eye(u.shape[-1], dtype=torch.bool, device=u.device)
        return both * apart

    @torch.no_grad()
    def review_table(self) -> float:
        """Error of the table half way between knots, relative to the channels' ranges; 0 for the direct form.

        Where it is too large for these weights, the direct form takes over from here on and a warning says so.
        """
        if self.grid is None:
            return 0.0
        found = build_table(lambda u: _pair(self.radial(u, 1)), self.grid, like=self.radial.centre)
        if isinstance(found, DirectForm):
            logger.warning(
                "the radial table of %d knots misses the exact function by %.1e of its range: the direct form is used, "
                "which is slower; a model with more model.radial_knots would not need it",
                self.grid.knots,
                found.error,
            )
            self.grid = None
        return found.error

    def pieces(self) -> Tensor:
        """Hermite pieces [K-1, 4, C] of the radial channels, built from the exact function at the knots."""
        assert self.grid is not None
        values, slopes = self.radial(self.grid.positions(self.radial.centre), 1)
        return hermite_pieces(values, slopes, self.grid)

    def scalar(self, found: PairDistances, context: Context, noise_std: Tensor) -> Tensor:
        """u [B, P] of every pair."""
        distance, pairs = found.distance, found.pairs
        at_pairs = lambda field: field[:, pairs.first, pairs.second]  # noqa: E731
        segment, reference = at_pairs(context.pair_segment), at_pairs(context.pair_reference)
        width = torch.sqrt(RELATIVE_WIDTH**2 + noise_std**2).unsqueeze(1)
        relative = torch.asinh((distance - reference) / width).clamp(-RELATIVE_REACH, RELATIVE_REACH)
        z = torch.where(segment <= 2, relative, compressed(found.shrunk))
        code = self._element_code(context, pairs)
        origin = distance.new_tensor(_ORIGINS)[segment]
        return self.gain(code).squeeze(-1) * z + self.shift(code).squeeze(-1) + origin

    def image_scalar(self, distance: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """u [E] of pairs of a site and a periodic image, at distances [E] in Å, with their elements [E]."""
        code = torch.minimum(first, second) * ELEMENTS + torch.maximum(first, second)
        return self.gain(code).squeeze(-1) * compressed(distance) + self.shift(code).squeeze(-1) + _ORIGINS[4]

    def _element_code(self, context: Context, pairs: PairList) -> Tensor:
        a, b = context.element[:, pairs.first], context.element[:, pairs.second]
        return torch.minimum(a, b) * ELEMENTS + torch.maximum(a, b)

    def static(self, pairs: PairList, context: Context) -> Tensor:
        """Path and bond encodings [b, P, C]."""
        length = context.path_length[:, pairs.first, pairs.second].clamp(max=self.max_path + 1)
        return self.path(length) + self.bond(context.bond_order[:, pairs.first, pairs.second])

    def dense_static(self, pairs: PairList, context: Context, channels: int | None = None) -> Tensor:
        """All static encodings [b, C, N, N], 0 on the diagonal; of the first `channels` alone where that is said."""
        dense = spread(self.static(pairs, context)[..., :channels], pairs)
        if self.features is None:
            return dense
        apart = ~torch.eye(dense.shape[-1], dtype=torch.bool, device=dense.device)
        given = self.features(context.pair_features)[..., :channels].permute(0, 3, 1, 2)
        return dense + given.contiguous() * apart

    def unlinked(self) -> Tensor:
        """The same [C] for two sites that no path of bonds joins."""
        codes = torch.tensor([self.max_path + 1, 0], device=self.path.weight.device)
        return self.path(codes[:1])[0] + self.bond(codes[1:])[0]


def _pair(both: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    value, slope = both
    return value, slope


def spread(of_pairs: Tensor, pairs: PairList) -> Tensor:
    """[B, C, N, N], 0 on the diagonal, from values [B, P, C] of the pairs i < j."""
    n = math.isqrt(len(pairs.expand))
    padded = pad(of_pairs.transpose(1, 2), (0, 1))
    return padded.index_select(2, pairs.expand).view(len(of_pairs), -1, n, n)
