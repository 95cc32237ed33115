"""features -> trunk -> heads: the score network of atomistic systems. The only nn.Module that others name.

It maps noised positions in the frame of the data (Å), the static context and the noise level (noise_std, Å per
coordinate) to vectors of order 1 per site. It knows no schedule; diffusion.composition turns its output into a score.
SE(3)-equivariant, not reflection-equivariant; permutation-equivariant; sites that are not present change nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dig_scale.batch import Context, Score, State
from dig_scale.config import Model
from dig_scale.model.features import ENVIRONMENT_CODES
from dig_scale.model.graphormer import Trunk
from dig_scale.model.heads import VectorHead
from dig_scale.model.leaves import NormalEmbedding
from dig_scale.model.pair_bias import ELEMENTS, PairBias
from dig_scale.model.pair_operators import PairOperators
from dig_scale.model.select import PairWidths, geometry_builder

MAX_DEGREE = 16
FOURIER_FREQUENCIES = 32


class NoiseEmbedding(nn.Module):
    """noise_std [B] in Å -> condition [B, D] through sines of its logarithm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 * FOURIER_FREQUENCIES + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, noise_std: Tensor) -> Tensor:
        """[B, D]."""
        level = torch.log(noise_std).unsqueeze(-1) / 4
        steps = torch.arange(FOURIER_FREQUENCIES, device=level.device, dtype=level.dtype)
        frequency = math.pi * 2 ** (steps * 5 / FOURIER_FREQUENCIES - 2)
        return self.net(torch.cat([level, torch.sin(level * frequency), torch.cos(level * frequency)], dim=-1))


class SiteEmbedding(nn.Module):
    """Graphormer's node encodings: element, degree (centrality) and hashed environment."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.element = NormalEmbedding(ELEMENTS, width, std=0.5)
        self.degree = NormalEmbedding(MAX_DEGREE, width, std=0.5)
        self.environment = NormalEmbedding(ENVIRONMENT_CODES, width, std=0.5)

    def forward(self, context: Context) -> Tensor:
        """[b, N, D]."""
        degree = context.degree.clamp(max=MAX_DEGREE - 1)
        return self.element(context.element) + self.degree(degree) + self.environment(context.environment)


class ScoreModel(nn.Module):
    """Graphormer score network; see the module's header. Call: (State, Context, noise_std [B] Å) -> Score of order 1."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.config = config
        self.sites = SiteEmbedding(config.width)
        self.noise = NoiseEmbedding(config.width)
        self.pair_bias = PairBias(config, config.heads + 2 * config.vector_channels)
        self.node_feature = nn.Linear(config.vector_channels, config.width)
        self.trunk = Trunk(config)
        self.head = VectorHead(config)

    def forward(self, state: State, context: Context, noise_std: Tensor) -> Score:
        """Vectors [B, N, 3] for positions; absent sites get 0."""
        assert state.positions is not None
        with torch.autocast(state.positions.device.type, enabled=False):  # distances need every digit
            pairs, summed = self.geometry(state.positions, context, noise_std)
        tokens = self.sites(context) + self.node_feature(summed)
        tokens, ledgers = self.trunk(tokens, self.noise(noise_std), pairs)
        vectors = self.head(tokens, pairs, ledgers)
        return Score(positions=vectors * context.present.unsqueeze(-1))

    def geometry(self, positions: Tensor, context: Context, noise_std: Tensor) -> tuple[PairOperators, Tensor]:
        """Operators over the pairs of the batch, and the node feature sum_j g(u_ij) [B, N, M]."""
        c, m = self.config, self.config.vector_channels
        widths = PairWidths(heads=c.heads, filters=m, node=m, layers=c.layers, head_width=c.width // c.heads)
        return geometry_builder(c.kernels, positions)(self.pair_bias, widths, positions, context, noise_std)


def count_parameters(config: Model) -> int:
    """Parameters of a model of this size, counted on the meta device (no memory is used)."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ScoreModel(config).parameters())
