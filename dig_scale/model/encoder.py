"""What all networks share: features -> tokens -> trunk, with the pair geometry that their heads read out.

It maps noised structures on the scale of the data (Geometry, Å), the static context and the noise level (noise_std, Å per
coordinate) to tokens per site. It knows no schedule and no head. Its parts are named in checkpoints: heads are added by
inheriting from it, beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dig_scale.batch import Context, Geometry
from dig_scale.config import Model
from dig_scale.model.features import ENVIRONMENT_CODES
from dig_scale.model.graphormer import Guides, Trunk
from dig_scale.model.images import image_geometry
from dig_scale.model.leaves import ELEMENTS, ElementEmbedding, FeatureReader, NormalEmbedding
from dig_scale.model.pair_bias import PairBias
from dig_scale.model.pair_operators import Ledgers, PairOperators
from dig_scale.model.select import PairWidths, attention_dtype, clean_scale, geometry_builder
from dig_scale.model.template import TemplateReader, laid_template
from dig_scale.system import SiteRole

MAX_DEGREE = 16
FOURIER_FREQUENCIES = 32
PLACE_FREQUENCIES = 16


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
    """Graphormer's node encodings: element or residue type, degree (centrality) and hashed environment; role, and place along
    a chain; and the features of another network, where the model reads some."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        width = config.width
        residues = config.sites == "residues"
        self.element = NormalEmbedding(ELEMENTS, width, std=0.5) if residues else ElementEmbedding(width, std=0.35)
        self.degree = NormalEmbedding(MAX_DEGREE, width, std=0.5)
        # of many anchored systems: surroundings that none of them has say nothing
        self.environment = NormalEmbedding(ENVIRONMENT_CODES, width, std=0.0 if config.sites == "anchored" else 0.5)
        self.role = NormalEmbedding(len(SiteRole), width, std=0.5) if config.sites == "anchored" else None
        self.place = nn.Linear(2 * PLACE_FREQUENCIES, width) if residues else None
        count = config.site_features
        self.features = FeatureReader(count, nn.Linear(count, width)) if count else None

    def forward(self, context: Context) -> Tensor:
        """[b, N, D]."""
        degree = context.degree.clamp(max=MAX_DEGREE - 1)
        tokens = self.element(context.element) + self.degree(degree) + self.environment(context.environment)
        if self.role is not None:
            tokens = tokens + self.role(context.role)
        if self.features is not None:
            tokens = tokens + self.features(context.site_features)
        return tokens if self.place is None else tokens + self.place(_waves(context.place).to(tokens.dtype))


def _waves(place: Tensor) -> Tensor:
    """Sines and cosines [b, N, 2 F] of places along a chain, wavelengths from 2 to 2000 residues."""
    steps = torch.arange(PLACE_FREQUENCIES, device=place.device, dtype=torch.float32) / (PLACE_FREQUENCIES - 1)
    angle = place.unsqueeze(-1) * (math.pi * 1000**-steps)
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)


class PropertyEmbedding(nn.Module):
    """Wanted properties [b, C] in units of their spread -> [b, D]; what is not given counts as unknown."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.count = len(config.conditions)
        self.given = nn.Sequential(nn.Linear(3 * self.count, config.width), nn.SiLU())
        self.out = nn.Linear(config.width, config.width)

    def forward(self, context: Context) -> Tensor:
        """[b, D]; the context's properties are those of the model's configuration, or none at all."""
        known = context.known.to(self.out.weight.dtype)
        value = context.condition.to(known.dtype) * known
        if not value.shape[1]:
            value = known = value.new_zeros(len(value), self.count)
        return self.out(self.given(torch.cat([value, torch.tanh(value), known], dim=-1)))


@dataclass(frozen=True)
class Encoded:
    """Tokens [B, N, D] of the sites, and what heads read out beside them."""

    tokens: Tensor
    pairs: PairOperators
    guides: Guides
    ledgers: Ledgers


class Encoder(nn.Module):
    """Features, trunk and pair bias; networks inherit from it and add their heads."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.config = config
        self.sites = SiteEmbedding(config)
        self.noise = NoiseEmbedding(config.width)
        self.properties = PropertyEmbedding(config) if config.conditions else None
        self.pair_bias = PairBias(config, config.heads + 2 * config.vector_channels)
        self.node_feature = nn.Linear(config.vector_channels, config.width)
        self.template = TemplateReader(config) if config.superposed_template else None
        self.trunk = Trunk(config)

    def encode(self, seen: Geometry, context: Context, noise_std: Tensor) -> Encoded:
        """The trunk's answer to noised structures at noise levels [B] Å."""
        dtype = attention_dtype(seen.positions)  # read before autocast is off
        with torch.autocast(seen.positions.device.type, enabled=False):  # distances need every digit
            pairs, summed = self.geometry(seen, context, noise_std, dtype)
            guides = self.guides(seen, context, noise_std)
            laid = laid_template(seen, context, noise_std) if self.template is not None else None
        condition = self.noise(noise_std)
        if self.properties is not None:
            condition = condition + self.properties(context)
        tokens = self.sites(context) + self.node_feature(summed)
        if self.template is not None and laid is not None:
            tokens, guides = tokens + self.template(laid.seen), replace(guides, vector=laid.vectors)
        tokens, ledgers = self.trunk(tokens, condition, pairs, guides)
        return Encoded(tokens, pairs, guides, ledgers)

    def guides(self, seen: Geometry, context: Context, noise_std: Tensor) -> Guides:
        """Displacements from the anchors over their spread at this noise, where sites have anchors; frames as they are."""
        if self.config.sites != "anchored":
            return Guides(frames=seen.rotations)
        spread = torch.sqrt(context.extent**2 + noise_std.unsqueeze(-1) ** 2).unsqueeze(-1)
        offset = torch.where(context.mobile.unsqueeze(-1), (seen.positions - context.anchor) / spread, 0.0)
        return Guides(vector=offset.transpose(1, 2).unsqueeze(2))

    def geometry(
        self, seen: Geometry, context: Context, noise_std: Tensor, dtype: torch.dtype
    ) -> tuple[PairOperators, Tensor]:
        """Operators over the pairs of the batch, their attention in `dtype`, and the node feature sum_j g(u_ij) [B, N, M]."""
        c, m = self.config, self.config.vector_channels
        widths = PairWidths(
            heads=c.heads,
            filters=m,
            node=m,
            layers=c.layers,
            head_width=c.width // c.heads,
            attention_dtype=dtype,
        )
        if seen.cell is not None:
            return image_geometry(self.pair_bias, widths, seen, context, c.cutoff)
        if c.sites == "anchored" and bool(context.periodic.any()):
            cell = context.cell.expand(len(seen.positions), 3, 3)
            inside = Geometry(clean_scale(seen.positions, context, noise_std), cell=cell)
            return image_geometry(self.pair_bias, widths, inside, context, c.cutoff)
        build = geometry_builder(c.kernels, seen.positions)
        return build(self.pair_bias, widths, seen.positions, context, noise_std)
